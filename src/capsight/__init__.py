"""capsight: cheaper vision-language models without retraining."""
