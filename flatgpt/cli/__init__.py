import sys

# Ctrl-C while a script's first modules are imported: no traceback. Later, run_script handles it.
sys.excepthook = lambda cls, *args: None if cls is KeyboardInterrupt else sys.__excepthook__(cls, *args)
