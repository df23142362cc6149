"""Small trained VLMs of other shapes and classes than the reference VLM: judges of what a method keeps."""
