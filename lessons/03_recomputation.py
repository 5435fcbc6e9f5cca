# %% [markdown] lang="en"
# # 3. Recomputation
#
# Activations can be thrown away after forward and computed again in backward. That costs a second forward pass, and saves most of what lesson 1
# found at the peak. But are the results the same?
# %% [markdown] lang="ja"
# # 3. 再計算
#
# 活性値は、順伝播のあとで捨て、逆伝播で計算し直すことができます。順伝播を 2 回行うことになりますが、レッスン 1 で見たピークの大部分を節約
# できます。では、結果は同じでしょうか。
# %%
import lesson

import memfit

job = lesson.job(lesson.ALPHAFOLD)
for plan in (None, "activation-checkpointing"):
    result = memfit.estimate(job, plan=plan)
    peak = lesson.mib(result.allocated_bytes.value)
    print(f"{result.plan.label:35} {peak:>9}, peak in {result.estimate.peak_phase}")

# %% [markdown] lang="en"
# Recomputing every block leaves the inputs of the blocks and the inside of one block at a time. Train both, three steps, and look at the losses.
# %% [markdown] lang="ja"
# 全ブロックを再計算すると、残るのは各ブロックの入力と、計算中の 1 ブロックの内部だけです。両方を 3 ステップ学習し、損失を比べます。
# %%
plain = lesson.train(lesson.ALPHAFOLD, steps=3)
recomputed = lesson.train(lesson.ALPHAFOLD, "activation-checkpointing", steps=3)
for name, run in (("plain", plain), ("recomputed", recomputed)):
    print(f"{name:11} peak {lesson.mib(run.peak_bytes)}, losses {run.losses}")

# %% [markdown] lang="en"
# ## Question
#
# Compared with plain training, the losses under activation checkpointing are
#
# - a: equal, bit for bit
# - b: equal up to rounding
# - c: different, but as good
# %% [markdown] lang="ja"
# ## 問題
#
# 勾配チェックポイントを使ったときの損失は、通常の学習と比べてどうなるでしょうか。
#
# - a：ビット単位で一致する
# - b：丸め誤差の範囲で一致する
# - c：異なるが、同じくらい良い
# %%
gap = max(abs(a - b) for a, b in zip(plain.losses, recomputed.losses, strict=True))
same = plain.weights_digest == recomputed.weights_digest
question = lesson.Question(
    truth="a" if gap == 0 else "b" if gap < 1e-3 else "c",
    because=f"largest difference of three losses: {gap}; weights equal: {same}",
)
lesson.finish(question, lesson.answer())
