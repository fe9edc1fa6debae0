"""The scoring pool's core: rewards and the frozen reference. Importing this loads no torch."""
