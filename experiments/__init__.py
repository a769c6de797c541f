"""The main program and what uses the library from outside."""
