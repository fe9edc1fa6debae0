"""What a line of the record says of the prompts that were finished since the line before."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from rlhf_cluster.errors import RlhfError
from rlhf_cluster.generating.answers import Answers


class Progress:
    """`add` says when `every` prompts more are done; `take` gives their numbers and begins anew."""

    def __init__(self, every: int, prompts: int, samples_per_prompt: int) -> None:
        """`prompts` are done already."""
        self._every, self._samples = every, samples_per_prompt
        self.prompts = prompts
        self.prompt_s = 0.0  # wall time of one of the last prompts
        self._new: list[Answers] = []
        names = ("discarded_total", "unrevised_total", "unusable_replies_total")
        self._totals: dict[str, Counter[str]] = {name: Counter() for name in names}
        self._began: float | None = None

    @property
    def is_open(self) -> bool:
        """There are prompts that no line tells of yet."""
        return bool(self._new)

    def begin(self, now: float) -> None:
        """Work begins: wall time counts from here. `now` in seconds."""
        self._began = now

    def add(self, answers: Answers) -> bool:
        self._new.append(answers)
        self.prompts += 1
        revised = [each.revised for each in answers.answers if each.revised is not None]
        for each in (*revised, *answers.unrevised):
            self._totals["unusable_replies_total"].update(each.unusable)
        for lost in answers.unrevised:
            self._totals["unrevised_total"][lost.problem] += 1
        return len(self._new) >= self._every

    def discard(self, error: RlhfError) -> None:
        self._totals["discarded_total"][type(error).__name__] += 1

    def take(self, now: float) -> Mapping[str, float]:
        """Metrics by name. There must be a prompt that no line tells of yet."""
        groups, self._new = self._new, []
        answers = [answer for group in groups for answer in group.answers]
        took = 0.0 if self._began is None else now - self._began
        self._began = now
        self.prompt_s = took / len(groups)
        tokens = sum(answer.num_tokens for answer in answers)
        found = {
            "generate/prompts": float(self.prompts),
            "generate/samples": float(self.prompts * self._samples),
            "generate/tokens_per_s": tokens / took if took > 0 else 0.0,
        }
        for name, counts in self._totals.items():
            found |= {f"generate/{name}/{key}": float(number) for key, number in counts.items()}
        if answers:  # all may have been given up before they were scored
            best = [max(a.reward for a in group.answers) for group in groups if group.answers]
            found |= {
                "generate/reward_mean": sum(answer.reward for answer in answers) / len(answers),
                "generate/best_reward_mean": sum(best) / len(best),
                "generate/cut_fraction": sum(answer.cut for answer in answers) / len(answers),
            }
        if revised := [answer.revised.reward for answer in answers if answer.revised is not None]:
            found["generate/revised_reward_mean"] = sum(revised) / len(revised)
        return found
