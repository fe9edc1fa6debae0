"""The learner: policy, packing, sharding and the optimizer step. It knows no algorithm by name.

Nothing is imported here, so that the numpy-only parts (`packing`, `schedule`) load without torch.
"""
