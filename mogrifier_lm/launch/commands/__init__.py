"""The commands beside train: a module each, whose docstring is its manual.

`main` takes what the command line says, by keyword; `command` reads it. scripts/ holds a door to
each for a checkout, and the wheel installs each as mogrifier-NAME.
"""
