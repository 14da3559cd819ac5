"""The methods that are compared: one table for the demo, the comparison, its figures, and the certificate.

A new method is its script, its YAMLs (configs/KEY.yaml and configs/smoke/KEY.yaml) and a line here.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Method:
    """The name of a method, the script that trains it, and its colour and marker in figures.

    key: the name of its YAML, and of its run's folder in models/.
    script: the script that trains it; None for the base, and for best-of-n, which only chooses completions of the base.
    learns_from: "text", "pairs", "rollouts" or "groups". This decides its figures and what its runs need.
    own_config: whether the script reads configs/KEY.yaml by default; else its command has --config.
    seconds: of its stage in the demo, on two cores of an AMD EPYC with avx512_bf16.
    tiny: options of the one-second runs by which the certificate tests the script.
    """

    key: str
    label: str
    color: str
    marker: str
    script: str | None = None
    learns_from: str | None = None
    own_config: bool = True
    seconds: float = 0.0
    tiny: dict = field(default_factory=dict)

    @property
    def command(self):
        """The command that trains it, as a person would type it."""
        return f"python {self.script}" + ("" if self.own_config else f" --config configs/{self.key}.yaml")


# the colours of Okabe & Ito (2008), which colour-blind people can distinguish, and a different marker for each method
METHODS = (
    Method("base", "base", "#000000", "s"),
    Method("sft", "SFT on chosen", "#999999", "D", "train/train_lm_lora.py", "text", own_config=False, seconds=54),
    Method("best_of", "best of {n}", "#CC79A7", "P"),
    Method("dpo", "DPO", "#0072B2", "o", "rlhf/dpo_train.py", "pairs", seconds=84),
    Method(
        "ppo", "PPO", "#E69F00", "^", "rlhf/ppo_train.py", "rollouts", seconds=160,
        tiny={"samples_per_prompt": 2, "inner_epochs": 1, "minibatches": 1},
    ),
    Method(
        "grpo_offline", "GRPO offline", "#56B4E9", "v", "rlhf/grpo_train.py", "groups", own_config=False, seconds=49,
        tiny={"inner_epochs": 2},
    ),
    Method(
        "grpo", "GRPO online", "#009E73", "*", "rlhf/grpo_train.py", "rollouts", seconds=263,
        tiny={"samples_per_prompt": 4, "inner_epochs": 2},
    ),
)  # fmt: skip
REWARD_MODEL = "python rlhf/train_reward_model.py"  # makes the reward model that best-of-n needs


def method_of(key):
    """The method with this key."""
    return next(method for method in METHODS if method.key == key)
