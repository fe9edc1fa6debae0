"""The carrying half of rlhf_cluster: Ray actors, vLLM engines, placement, transport, retries.

No decision about reinforcement learning is made here; those live in `rlhf_cluster`.
"""
