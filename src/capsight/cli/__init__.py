"""The command line: ``capsight demo | generate | fit | inspect | eval``."""
