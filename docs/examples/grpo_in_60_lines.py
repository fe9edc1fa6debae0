"""GRPO with the defaults, step by step: the loss of one optimizer step from plain tensors.

Run: python docs/examples/grpo_in_60_lines.py
"""

import torch

CLIP_LOW, CLIP_HIGH = 0.2, 0.28  # algorithm.clip_low, algorithm.clip_high
CAP = 2.0  # algorithm.correction = { type = "token_tis", cap = 2 }

torch.manual_seed(0)
# Two prompts, three responses each; a response has one reward and 2 to 5 tokens.
prompt = torch.tensor([0, 0, 0, 1, 1, 1])
rewards = torch.tensor([1.0, 0.0, 0.5, 0.0, 0.0, 1.0], dtype=torch.float64)
num_tokens = torch.tensor([3, 2, 5, 4, 2, 3])
response = torch.arange(6).repeat_interleave(num_tokens)  # [N] the response of each token
# Three policies gave each token a log-probability [N]. The engine samples with older weights than
# the learner has at the start of the step, and each minibatch of the step moves the learner on.
sampler = -2 - torch.rand(len(response), dtype=torch.float64)
proximal = sampler + 0.7 * torch.randn_like(sampler)
learner = (proximal + 0.3 * torch.randn_like(sampler)).requires_grad_()

# 1. Advantage: how much better a response is than the others of its prompt, in standard deviations.
advantages = torch.zeros(6, dtype=torch.float64)
for one in prompt.unique():
    group = rewards[prompt == one]
    advantages[prompt == one] = (group - group.mean()) / (group.std() + 1e-4)
advantages = advantages.float()[response].double()  # stored as float32; one value for all tokens

# 2. Ratio: how far this step has moved the policy. It carries the gradient. Exactly 1 in the first
#    minibatch, as learner and proximal policy are the same then.
ratio = (learner - proximal).exp()

# 3. Correction weight: the samples came from `sampler`, the step starts at `proximal`. The weight is
#    truncated, so that a token that the sampler hardly ever draws cannot dominate. No gradient.
weight = (proximal - sampler).exp().clamp(max=CAP)

# 4. Clip: once the ratio is past a bound in the direction of the advantage, moving further earns
#    nothing, so the token's gradient is 0.
clipped_ratio = ratio.clamp(1 - CLIP_LOW, 1 + CLIP_HIGH)
surrogate = -torch.minimum(ratio * advantages, clipped_ratio * advantages)

# 5. Loss of each token, and their mean over all tokens of the step (aggregation = "token_mean").
token_losses = weight * surrogate
loss = token_losses.sum() / num_tokens.sum()
loss.backward()

if __name__ == "__main__":
    clipped = ratio * advantages > clipped_ratio * advantages
    print(f"loss {loss.item():.6f}, {int(clipped.sum())} of {len(ratio)} tokens clipped")
    print(f"weights at the cap: {int((weight == CAP).sum())}")
