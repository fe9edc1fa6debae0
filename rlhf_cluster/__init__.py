"""The deciding half of rlhf_cluster: everything that can be wrong in an interesting way.

Nothing below this package imports ray or vllm (tests/unit/repository/test_boundaries.py holds the
line); the processes, placement and transport live in `actors`.
"""

__version__ = "0.1.0"
