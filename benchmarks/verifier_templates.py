r"""How chat models write an answer down: the templates of `benchmarks/verifier_cases.py`.

In a template `@n` is the answer, `@t` the answer with thousands commas, `@b` with `{,}`, `@l` in
LaTeX, `@e` arithmetic that comes to it, `@o` and `@p` other numbers, `@w` the solution, `@v` a wrong
answer. `STATED` and `STATED_FORMULA` state `@n`; `REFUSED` and `REFUSED_FORMULA` name it and state
none. A template is a line, in which `\n` ends a line.
"""

from __future__ import annotations


def _templates(lines: str) -> tuple[str, ...]:
    return tuple(line.replace(r"\n", "\n") for line in lines.strip().splitlines())


_ONE_LINE = r"""
@w\nThe answer is @n.
@w\nThe answer is: @n
@w\nThe answer is **@n**.
@w\n**The answer is @n.**
@w\nThe final answer is $@l$.
@w\nThe final answer is \(@b\).
@w\nThe final answer is @t clips.
@w\nSo the answer is $@t.
@w\nThus, the correct answer is @n.
@w\nTherefore, the answer would be @n.
@w\nHence the answer equals @n.
@w\nThe answer to the question is @n apples.
@w\n\nAnswer: @n
@w\n\nAnswer: @t
@w\n\nAnswer: $@t
@w\n\nAnswer: **@n**
@w\n\nAnswer: @n.
@w\n\nANSWER: @n
@w\n\n**Answer: @n**
@w\n\n**Answer:** @n eggs per day
@w\n\n**Answer:** $@l$
@w\n\n**Final Answer:** \(@l\)
@w\n\n**Final Answer: @n**
@w\n\n**Final Answer:** **@n**
@w\n\n**Final answer**: @t
@w\n\n### Final Answer\n@n
@w\n\n### Final Answer\n\n**@n**
@w\n\n### Final Answer\n\nShe makes @n dollars every day.
@w\n\n### Final Answer\n\nThe total number of clips is @n.
@w\n\n### Final Answer:\n\n$$@l$$
@w\n\n## Answer\n\nIn @o days, they pick @n apples.
@w\n\n#### Answer\n\nThe train covers @t miles.
@w\n\nAnswer: Janet makes $@n every day.
@w\n\nAnswer: They have @t marbles altogether.
@w\n\nAnswer: He needs @n more dollars.
@w\n\nAnswer: After @o weeks he has saved $@n.
@w\n\nAnswer: With @o friends, each one gets @n.
@w\n\nAnswer: The @o boys have @n marbles.
@w\n\nAnswer: The cost of @o shirts is $@t.
@w\n\nAnswer: All @o of them weigh @n kg.
@w\n\nAnswer: Tom's @o dogs eat @n pounds of food.
@w\n\n**Answer:** The total for @o nights is $@n.
@w\n\nFinal answer: the @o chairs cost @n euros.
@w\n\nAnswer: @e = @n
@w\n\nThe answer is @e = @n.
@w\n\nThe answer is @e = @n apples.
@w\n\n**Answer:** $@e = @n$
@w\n\nSo the total is @e = @n.
@w\n\nSo she has @e = **@n** of them.
@w\n\n\[ @e = \boxed{@l} \]
@w\n\n$\boxed{@e = @l}$
@w\n<answer>@n</answer>
@w\n<answer>@t</answer>
@w\n<answer>$@n</answer>
@w\n<answer> @n apples </answer>
@w\n<answer>\n@n\n</answer>
@w\n<answer>The answer is @n.</answer>
@w\n<answer>She has @n apples.</answer>
@w\n<answer>The @o boxes hold @n apples.</answer>
@w\n<answer>\(@l\)</answer>
@w\n<answer>$@l$</answer>
@w\n<answer>\boxed{@l}</answer>
<think>Perhaps @o, or \boxed{@p}?</think>\n<answer>@n</answer>
<think>\n@w\nThe answer is @o?\n</think>\n\nThe answer is @n.
<think>\n@w\n</think>\n\n**Answer:** @n
@w\nWait, \boxed{@o}?\n</think>\n\n\boxed{@l}
<think>@w</think>\n\nSo it is \boxed{@l}.
@w\n\n\boxed{@l}
@w\n\n$\boxed{@l}$
@w\n\n$$\boxed{@b}$$
@w\n\n\[\n\boxed{@l}\n\]
@w\n\nTherefore $x = \boxed{@l}$.
@w\n\n$\boxed{x = @l}$
@w\n\n$\boxed{\text{Total: } @l}$
@w\n\n$\boxed{\$@t}$
@w\n\n$\boxed{@l \text{ dollars}}$
@w\n\n$\boxed{@l\text{ cm}}$
@w\n\n$\boxed{@l\,\text{cm}^2}$
@w\n\n$\boxed{@l\,\text{m/s}}$
@w\n\n$\boxed{@l\,\frac{\text{m}}{\text{s}}}$
@w\n\n$\boxed{@l\%}$
@w\n\n$\boxed{@l^\circ}$
@w\n\n$\boxed{\mathbf{@l}}$
@w\n\n$\boxed{\text{@n}}$
@w\n\n$\boxed{\textbf{@n}}$
@w\n\n$\boxed{@l.}$
@w\n\n$\boxed{@t}$
@w\n\n\boxed{@n apples}
@w\n\n\boxed{@n}\n\nThis matches the @o items above.
@w\n\n\boxed{@n}\n\nLet me know if you have @o more questions!
\boxed{@n}\n\n@w
The answer is @n. Here is why:\n\n@w
**@n**\n\nConfidence: 95%
@w\n\n**@n**\n\nConfidence: 90%
@w\n\n**Answer: @n** (confidence: 95%)
@w\n\nThe answer is **@n**, which is @o more than @p.
@w\n\nThe answer is **@n** because of the @o items.
@w\n\nThe answer is @n (that is, @o more than @p).
@w\n\nThe answer is @n, since there are @o of them.
@w\n\nThe answer is @n. I checked it @o times.
@w\n\n**@n**
@w\n\n**Total: @n**
@w\n\n**Total:** @t
@w\n\nTotal = @n
@w\n\nTotal: $@n
@w\n\n= @n
@w\n\n= **@n dollars**
@w\n\nTherefore, she earned @n dollars.
@w\n\nSo there are @t people left.
@w\n\n**So there are @t people left.**
@w\n\nThus he paid $@n in total.
@w\n\nSo each one gets @n!
@w\n\nIn total, the @o children have @n marbles.
@w\n\n**In total, the @o children have @n marbles.**
@w\n\nAfter @o hours the tank holds @n liters.
@w\n\nIt takes her **@n minutes**.
@w\n\nIt takes her **@n** minutes for all @o pages.
@w\n\nTherefore, $x = @l$.
@w\n\nSo \(x = @l\).
@w\n\n\[ x = @l \]
@w\n\n\begin{aligned} x &= @e \\ &= @l \end{aligned}
@w\n\n\[\begin{aligned} x &= @l \end{aligned}\]
@w\n\n$\boxed{\begin{aligned} x &= @l \end{aligned}}$
@w\n\n```json\n{"answer": @n}\n```
@w\n\n{"answer": "@n"}
@w\n#### @n
@w\n#### @t
@w\n#### $@n
@w\n#### **@n**
@w\n#### @n apples
@w\n\n#### Final Answer: @t dollars
@w\n\n答案是@n。
@w\n\n答案:@n
@w\n\n最终答案:**@n**
@w\n\nLa réponse est... I mean, the answer is @n.
@w\n\nFinal Answer: The final answer is $@l$. I hope it is correct.
@w\n\nThe answer is not @o but @n.
@w\n\nThe answer is not @o. The answer is @n.
@w\n\nAt first I thought the answer is @o. Actually, the answer is @n.
@w\n\nThe answer is approximately @n.
@w\n\nThe answer is exactly @n.
@w\n\n✅ **Answer:** @n
@w\n\n> **Answer:** @n
@w\n\n- **Answer:** @n
@w\n\n| Item | Value |\n|---|---|\n| a | @o |\n\n**Answer:** @n
@w\n\n✅ Final answer: $@t per week
@w\n\nQ: how many?\nA: @n
@w\n\nThe solution is @n.
@w\n\nThe result is **@n**.
@w\n\nSo, the value of $x$ is $@l$.
@w\n\nSo the value of \( x \) is \( \boxed{@l} \).
@w\n\nAnswer: $\boxed{@l}$ dollars
@w\n\n### Result\n\n$$\boxed{@b}$$
@w\n\n---\n\n**Result:** @t 🎉
@w\n\n| Quantity | Value |\n|---|---|\n| First step | @o |\n| **Total** | **@t** |
@w\n\n| Step | Amount |\n|:--|--:|\n| Start | @o |\n| Change | @p |\n| Total | @t |
@w\n\n✅ **Final answer:** @t
@w\n\nWait, let me double-check: I first wrote @o, but that forgot a step. The answer is @n.
My first guess was @o, which is wrong. @w\nThe correct answer is **@n**.
<think>Maybe it is @o? Let me see.\n@w</think>\nThe answer is @n.
<think>\n@w\nSo the answer is @o. Hmm, no.\n</think>\n\n**@t**
@w\n\n```\nAnswer: @n\n```
```python\ntotal = work()\nprint(total)\n```\n\nOutput:\n\n```\n@n\n```
@w\n\n\[\n\text{Total} = @e = \boxed{@b}\n\]
@w\n\n$$\boxed{@b\ \text{dollars}}$$
@w\n\nSo in total that comes to **$@t**.
Of these options:\n(A) @o\n(B) @p\n(C) @n\n\nthe answer is (C) @n.
A) @o\nB) @n\nC) @p\n\n@w\n\nAnswer: B) @n
@w\n\nTherefore, she needs @t minutes in total (that is, @n, and not @o).
@w\nThe answer is not @o, as one might think at first, but @n.
@w\n\nFinal answer: @n (check: @e = @n ✓)
@w\n\n**Verification:** @e = @n. ✔\n\n**Answer: @n**
Answer: @n\n\nExplanation:\n@w
**TL;DR:** The answer is @n.\n\n@w
@w\n\n{"answer": @n}
@w\n\n```json\n{"steps": 3, "answer": "@n"}\n```
@w\n\nAltogether: @t people.
@w\n<answer>\n\boxed{@n}\n</answer>
@w\n\nTherefore:\n\n$$@b$$
@w\n\n#### $@t
@w\n\n> **@t**
@w\n\n**Answer**\n\n@t hours
@w\n\nHence $x = @b$, so the answer is $@b$.
@w\n\n1. First part: @o\n2. Second part: @p\n3. **Final answer: @n**
@w\n\nIn conclusion, the total number of books is $\mathbf{@b}$.
@w\n\nThe final answer is: $\boxed{@n}$. I hope it is correct.
@w\n\n∴ @n
@w\n\n**Final Answer**: \n\n\( \boxed{@b} \) cups
@w\nActually, scratch that: the answer is @n, since I had counted @o twice.
@w\n\nSo the answer is @n! 😊 Let me know if you have any other questions.
Sure! Here's the solution.\n\n@w\n\nSo the answer is **@n**.\n\nWould you like 2 more problems?
@w\n\n\boxed{@n}\n\nNote: rounding is not needed here, since all 3 inputs are whole.
@w\n\nThe answer is @t%.
@w\n\nThe answer is €@t.
@w\n\nThe answer is @t USD.
@w\n\nThe total cost is $@t.00.
@w\n\nResult = @n
@w\n\nANSWER\n======\n@n
@w\n\n<final>@n</final>
@w\n\nI am confident that the answer is @n.
@w\n\n**Ans.** @n
@w\n\n**答案：@n**
@w\n\nLa respuesta es @n.
@w\n\nAnd that's it — @t in all.
@w\n\nTo sum up, @n of the @o boxes' contents were counted, so our answer is @n.
@w\nThe answer is @n.</s>
@w\nThe answer is @n.<|eot_id|>
Answer: @n :)
@w\nSo that makes @n in total, and we are done!
@w\n\n**Total:** @t
The final result is: **@n**
Answer to the question: @n
"""
STATED = _templates(_ONE_LINE)

_REFUSED = r"""
@w\n\nThe answer is not @n.
@w\n\nThe answer isn't @n.
@w\n\nThe answer cannot be @n.
@w\n\nThe answer can't be @n.
@w\n\nThe answer is never @n.
@w\n\nThe answer is more than @n.
@w\n\nThe answer is less than @n.
@w\n\nThe answer is at least @n.
@w\n\nThe answer is at most @n.
@w\n\nThe answer is greater than @n.
@w\n\nThe answer is over @n.
@w\n\nThe answer is under @n.
@w\n\nThe answer is between @o and @n.
@w\n\nThe answer is between @n and @o.
@w\n\nThe answer is from @o to @n.
@w\n\nThe answer is @n to @o.
@w\n\nThe answer is @o to @n.
@w\n\nThe answer is @n-@o.
@w\n\nThe answer is @n–@o.
@w\n\nThe answer is @n, @o.
@w\n\nThe answer is @o, @n.
@w\n\nThe answer is @n, @o or @p.
@w\n\nThe answer is @n or @o.
@w\n\nThe answer is @o or @n.
@w\n\nThe answer is either @n or @o.
@w\n\nThe answer is @n and @o.
@w\n\nThe answer is @n / @o.
@w\n\nThe answer is @n or maybe @o.
@w\n\nThe answer is $@l \pm 1$.
@w\n\nThe answer is @n ± 1.
@w\n\nThe answer is @n +/- 2.
@w\n\nThe answer is maybe @n.
@w\n\nThe answer might be @n.
@w\n\nThe answer could be @n.
@w\n\nThe answer is possibly @n.
@w\n\nThe answer is perhaps @n, perhaps @o.
@w\n\nThe answer is @n is wrong.
@w\n\nAnswer: not @n
@w\n\nAnswer: @n is wrong.
@w\n\nAnswer: I cannot determine whether it is @n.
@w\n\nAnswer: I don't know, maybe @n.
@w\n\nAnswer: I'm not sure, @n?
@w\n\nAnswer: @n or @o
@w\n\nAnswer: @n, @o, @p
@w\n\nAnswer: @n and @o
@w\n\nAnswer: more than @n
@w\n\nAnswer: fewer than @n apples
@w\n\n**Answer:** @n–@o
@w\n\n**Answer:** between @n and @o
@w\n\n**Answer:** cannot be determined from the @n items
@w\n\n### Final Answer\n\nNot @n.
@w\n\n### Final Answer\n\n@n or @o
@w\n\n#### @n or @o
@w\n#### not @n
<answer>not @n</answer>
<answer>@n or @o</answer>
<answer>@n, @o</answer>
<answer>between @n and @o</answer>
<answer>maybe @n</answer>
<answer>> @n</answer>
\boxed{\text{not } @l}
\boxed{\text{more than } @l}
\boxed{@l \text{ or } @o}
\boxed{@o \text{ or } @l}
\boxed{@l, @o}
\boxed{@l \pm 1}
\boxed{@l \text{ to } @o}
\boxed{@l - @o}
\boxed{\text{between } @o \text{ and } @l}
\boxed{\text{maybe } @l}
\boxed{x > @l}
\boxed{x \ne @l}
\boxed{x \ge @l}
\boxed{@o < x < @l}
\boxed{@lx}
\boxed{x + @l}
\boxed{x^2 + @l}
\boxed{@l\sqrt{2}}
\boxed{@l\pi}
\boxed{\sqrt{@l}}
\boxed{\frac{\pi}{@l}}
\boxed{@l!}
\boxed{\ln @l}
\boxed{\{@l\}}
\boxed{(@l, @o)}
\boxed{@l^2}
\boxed{2^{@l}}
\boxed{@l:@o}
\boxed{@li}
\boxed{\binom{@l}{2}}
\boxed{\log_2 @l}
\boxed{x_{@l}}
\boxed{-(@l)}
\boxed{y^2 = x^2 + @l}
The answer is $@l\sqrt{2}$.
The answer is $\frac{\pi}{@l}$.
The answer is $\binom{@l}{2}$.
The answer is $\log_2 @l$.
The answer is $@l!$.
The answer is $@o<x<@l$.
The answer is $x^2+@l$.
The answer is \(@lx\).
The answer is $2^{@l}$.
The answer is $\sqrt{@l}$.
Answer: $x + @l$
Answer: $x \ge @l$
<think>\n@w\nThe answer is @n.
<think>\n@w\n\boxed{@l}
<think>\n\boxed{@l}</think>\nI do not know.
@w\n\boxed{@l}\n</think>\n
@w\n\nI can't tell whether it is @n or @o.
Suppose the answer is @n. Then a step would not fit, so that is a contradiction.
It can't be @n.
@w\n\nThe answer is definitely not @n.
@w\n\nThe answer is either @n or @p.
The answer is at most @n.
The answer is @n? I do not know.
Assume that the answer is @n.
I would need more information. If the price were @n, it would be easy.
(A) @n (B) @o (C) @p\n\nI am not sure which one.
<think>The answer is @n.
The answer is @n times something that I cannot work out.
The answer is neither @o nor @n.
Assume x = @n.
Let x = @n.
Were it @n, no.
Some say @n, but I disagree.
$\boxed{@n \text{ or } @o}$
The answer is @n + x.
Whether the answer is @n depends on the price, which is not given.
Is the answer @n?
The answer is not exactly @n.
The answer would be @n if every shop were open, but they are not.
If it were @n, the sum would be odd, so no.
Let's say the answer is @n.
A possible answer: @n
Example answer: @n
Sample answer: @n
Alternative answer: @n
Answer: option @n
Answer: @n is too small, so @o.
Answer: @n would be too large, so @o
Answer: @n if it rains, @o otherwise
Answer: @n? Actually no, @o.
The answer is @n. Oops, it is @o.
We can rule out @n.
So we reject @n.
@w\nThe answer was supposed to be @n, but I get @o.
The expected answer is @n but I get @o.
Answer: @n (or @o if you count the last one)
Answer: @n in base 13
"""
REFUSED = _templates(_REFUSED)

_STATED_FORMULA = r"""
@w\n\n\boxed{@l}
@w\n\n$\boxed{@l}$
@w\n\n$$\boxed{@l}$$
@w\n\n\[\n\boxed{@l}\n\]
@w\n\nTherefore, the answer is $\boxed{@l}$.
@w\n\nSo the final answer is \(\boxed{@l}\).
@w\n\n**Final Answer:** $\boxed{@l}$
@w\n\n### Final Answer\n\n$$\boxed{@l}$$
@w\n\n$\boxed{@l.}$
@w\n\n$\boxed{ @l }$
@w\n\n$\boxed{\displaystyle @l}$
@w\n\n\fbox{$@l$}
@w\n\n\boxed{$@l$}
@w\n\n\boxed{\(@l\)}
@w\n\nThe answer is $@l$.
@w\n\nThe answer is \(@l\).
@w\n\nThe final answer is $@l$.
@w\n\nThe final answer is:\n\[\n@l\n\]
@w\n\nThe answer is: $$@l$$
@w\n\nThus, the answer is **$@l$**.
@w\n\n**The answer is $@l$.**
@w\n\nAnswer: $@l$
@w\n\nAnswer: \(@l\)
@w\n\n**Answer:** $@l$
@w\n\n**Answer: $@l$**
@w\n\n**Final Answer:** \( @l \)
@w\n\n### Final Answer\n\n$@l$
@w\n\n### Final Answer\n\n\[ @l \]
@w\n\n## Answer\n\n**$@l$**
<answer>$@l$</answer>
<answer>\(@l\)</answer>
<answer>\boxed{@l}</answer>
@w\n<answer>$@l$</answer>
<think>Maybe \boxed{@v}?</think>\n\boxed{@l}
<think>\n@w\n</think>\n\nThe answer is $@l$.
Maybe \boxed{@v}.\n</think>\nSo \boxed{@l}.
@w\n#### $@l$
@w\n\nFinal Answer: The final answer is $@l$. I hope it is correct.
First we get \boxed{@v}. That was wrong, so \boxed{@l}.
@w\n\nTherefore, we obtain $@l$.
@w\n\nSo the result is \[ @l \]
\boxed{@l}\n\nThis can be checked by substitution.
@w\n\n**Answer:** \[ \boxed{@l} \]
@w\n\n$\boxed{@l} \quad \checkmark$
@w\n\nThus the answer is \[\boxed{@l}.\]
@w\n\n**Final answer:** $$@l$$
@w\n\n$\therefore \boxed{@l}$
@w\n\n\begin{align*}\n\boxed{@l}\n\end{align*}
<think>Perhaps $@v$?</think>\n\n@w\n\nAnswer: $@l$
@w\n\nI first thought that it was $@v$, but the correct answer is $@l$.
Answer: \(@l\)\n\nExplanation: @w
@w\n\nThe final answer is $\boxed{@l}$.
@w\n\n### Final Answer\n\n\[\n\boxed{@l}\n\]
@w\n\n✅ **Answer:** $@l$
"""
STATED_FORMULA = _templates(_STATED_FORMULA)

_REFUSED_FORMULA = r"""
The answer is not $@l$.
The answer isn't $@l$.
The answer cannot be $@l$.
The answer is maybe $@l$.
The answer might be $@l$.
The answer could be $@l$.
The answer is either $@l$ or $@v$.
The answer is $@l$ or $@v$.
The answer is $@v$ or $@l$.
Answer: not $@l$
Answer: $@l$ is wrong.
Answer: I don't know, maybe $@l$.
Answer: $@l$ or $@v$
<answer>not $@l$</answer>
<answer>$@l$ or $@v$</answer>
\boxed{\text{not } @l}
\boxed{\text{maybe } @l}
\boxed{@l \text{ is wrong}}
\boxed{@l} or \boxed{@v}
\boxed{@v} or \boxed{@l}
<think>\n\boxed{@l}
<think>\n\boxed{@l}</think>\nI do not know.
@w\n\boxed{@l}\n</think>\n
### Final Answer\n\n$@l$ or $@v$
It is unclear whether the answer is $@l$ or $@v$.
Suppose that the answer is $@l$.
<think>The answer is $\boxed{@l}$.
The answer would be $@l$ if the function were even, but it is not.
"""
REFUSED_FORMULA = _templates(_REFUSED_FORMULA)
