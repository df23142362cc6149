"""capsight inside other projects' evaluation harnesses; those are imported only when they load us."""
