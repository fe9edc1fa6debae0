"""Names of settings in TRL, verl and OpenRLHF, with the keys of run files that mean the same.

A name that several kinds of run files call differently has several keys, the likeliest first.
"""

from __future__ import annotations

from collections.abc import Mapping

_GROUP = "algorithm.group_size"
_GROUPS = "run.groups_per_step run.units_per_step"
_KL = "algorithm.kl_coef algorithm.loss.beta stage.loss.beta"
_LEARNING_RATE = "learner.learning_rate"
_MICRO_BATCH = "learner.tokens_per_micro_batch"
_PROMPT = "data.max_prompt_tokens data.max_tokens"
_RESPONSE = "generation.max_response_tokens"
_STEPS = "run.steps"

_NAMES: Mapping[str, str] = {
    # optimizer
    "lr": _LEARNING_RATE,
    "actor_learning_rate": _LEARNING_RATE,
    "critic_learning_rate": "critic.learning_rate",
    "critic_lr": "critic.learning_rate",
    "adam_beta1": "learner.beta1",
    "adam_beta2": "learner.beta2",
    "adam_epsilon": "learner.adam_eps",
    "clip_grad": "learner.max_grad_norm",
    "grad_clip": "learner.max_grad_norm",
    "lr_scheduler_type": "learner.schedule",
    "lr_scheduler": "learner.schedule",
    "lr_warmup_steps": "learner.warmup_steps",
    "lr_warmup_ratio": "learner.warmup_steps",
    "warmup_ratio": "learner.warmup_steps",
    # batches
    "batch_size": _GROUPS,
    "rollout_batch_size": _GROUPS,
    "train_batch_size": _GROUPS,
    "gradient_accumulation_steps": "learner.minibatches learner.tokens_per_micro_batch",
    "micro_train_batch_size": _MICRO_BATCH,
    "per_device_train_batch_size": _MICRO_BATCH,
    "ppo_max_token_len_per_gpu": _MICRO_BATCH,
    "ppo_micro_batch_size_per_gpu": _MICRO_BATCH,
    "mini_batch_size": "learner.minibatches",
    "ppo_mini_batch_size": "learner.minibatches",
    "max_epochs": "learner.epochs",
    "num_iterations": "learner.epochs",
    "ppo_epochs": "learner.epochs",
    # length of the run
    "max_steps": _STEPS,
    "num_steps": _STEPS,
    "num_episodes": _STEPS,
    "total_training_steps": _STEPS,
    "num_train_epochs": "run.epochs run.steps",
    "total_epochs": "run.epochs run.steps",
    "save_freq": "checkpoint.every",
    "save_steps": "checkpoint.every",
    "save_total_limit": "checkpoint.keep",
    "max_ckpt_num": "checkpoint.keep",
    "eval_steps": "run.evaluate_every evaluation.num_prompts",
    "test_freq": "run.evaluate_every evaluation.num_prompts",
    "experiment_name": "run.name",
    "run_name": "run.name",
    "ckpt_path": "run.root",
    "output_dir": "run.root",
    "save_path": "run.root",
    "random_seed": "run.seed",
    # algorithm
    "n": _GROUP,
    "num_generations": _GROUP,
    "n_samples_per_prompt": _GROUP,
    "adv_estimator": "algorithm.type",
    "advantage_estimator": "algorithm.type",
    "beta": _KL,
    "init_kl_coef": _KL,
    "kl_beta": _KL,
    "kl_loss_coef": _KL,
    "kl_loss_type": "algorithm.kl_estimator",
    "use_kl_in_reward": "algorithm.kl_in",
    "use_kl_loss": "algorithm.kl_in",
    "kl_target": "algorithm.kl_control.target",
    "kl_horizon": "algorithm.kl_control.horizon",
    "clip_ratio": "algorithm.clip_low",
    "clip_ratio_c": "algorithm.dual_clip",
    "clip_ratio_high": "algorithm.clip_high",
    "clip_ratio_low": "algorithm.clip_low",
    "epsilon": "algorithm.clip_low",
    "epsilon_high": "algorithm.clip_high",
    "eps_clip": "algorithm.clip_low",
    "cliprange_value": "algorithm.value_clip",
    "entropy_coeff": "algorithm.entropy_coef",
    "entropy_loss_coef": "algorithm.entropy_coef",
    "gamma": "algorithm.discount",
    "lam": "algorithm.trace",
    "lambd": "algorithm.trace",
    "loss_agg_mode": "algorithm.aggregation",
    "loss_type": "algorithm.aggregation stage.loss.type",
    "mask_truncated_completions": "algorithm.overlong_filter",
    "norm_adv_by_std_in_grpo": "algorithm.normalize_std",
    "scale_rewards": "algorithm.normalize_std",
    # generation
    "max_completion_length": _RESPONSE,
    "max_length": "generation.max_response_tokens data.max_tokens",
    "max_new_tokens": _RESPONSE,
    "max_response_length": _RESPONSE,
    "max_tokens": _RESPONSE,
    "generate_max_len": _RESPONSE,
    "max_prompt_length": _PROMPT,
    "prompt_max_len": _PROMPT,
    "max_len": "data.max_tokens generation.max_response_tokens",
    "temp": "generation.temperature",
    "tensor_model_parallel_size": "generation.tensor_parallel_size",
    "tp": "generation.tensor_parallel_size",
    "vllm_tensor_parallel_size": "generation.tensor_parallel_size",
    "vllm_num_engines": "generation.workers",
    "gpu_memory_utilization": "generation.kv_cache_bytes",
    "vllm_gpu_memory_utilization": "generation.kv_cache_bytes",
    # processes and devices
    "gpus": "learner.num_gpus generation.num_gpus",
    "n_gpus": "learner.num_gpus generation.num_gpus",
    "n_gpus_per_node": "learner.num_gpus generation.num_gpus",
    "num_processes": "learner.ranks",
    "world_size": "learner.ranks",
    "strategy": "learner.backend",
    "zero_stage": "learner.backend",
    "bf16": "learner.dtype",
    "torch_dtype": "learner.dtype",
    # model and adapters
    "model_name_or_path": "model.path",
    "model_name": "model.path",
    "pretrain": "model.path",
    "tokenizer_name": "model.tokenizer",
    "lora_alpha": "learner.lora.alpha",
    "lora_r": "learner.lora.rank",
    "lora_rank": "learner.lora.rank",
    "lora_target_modules": "learner.lora.targets",
    "target_modules": "learner.lora.targets",
    "use_peft": "learner.lora",
    "gradient_checkpoint": "learner.gradient_checkpointing",
    # data and rewards
    "dataset": "data.path data.sources.path",
    "dataset_name": "data.path data.sources.path",
    "prompt_data": "data.path data.sources.path",
    "train_files": "data.path data.sources.path",
    "eval_dataset": "evaluation.path",
    "val_files": "evaluation.path",
    "apply_chat_template": "data.template",
    "chat_template": "data.template",
    "input_key": "data.prompt_column",
    "prompt_key": "data.prompt_column",
    "label_key": "scoring.rewards.target_column",
    "ref_model_mixup_alpha": "scoring.reference_update.decay",
    "ref_model_sync_steps": "scoring.reference_update.every",
    "remote_rm_url": "scoring.rewards.url",
    "reward_fn": "scoring.rewards",
    "reward_funcs": "scoring.rewards",
    "reward_pretrain": "scoring.rewards.path",
    "rewards": "scoring.rewards",
    "report_to": "observe.sinks",
    "use_tensorboard": "observe.sinks",
    "use_wandb": "observe.sinks",
    # sections
    "actor": "learner generation",
    "policy": "model learner",
    "reward": "scoring.rewards",
    "reward_model": "scoring.rewards",
    "rollout": "generation",
    "trainer": "learner run",
}

OTHER_NAMES: Mapping[str, tuple[str, ...]] = {
    name: tuple(keys.split()) for name, keys in _NAMES.items()
}
"""Keys of run files by the name that another framework has for the same."""


def keys_meant(name: str) -> tuple[str, ...]:
    """Return the keys that the last part of `name` means elsewhere; empty for a name not listed."""
    return OTHER_NAMES.get(name.rpartition(".")[2].lower().replace("-", "_"), ())
