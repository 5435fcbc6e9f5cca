# %% [markdown] lang="en"
# # 1. Bet on the peak
#
# A small AlphaFold 2 has 226,000 parameters: 0.9 MiB of weights. How much memory does one training step of one protein of 32 residues take? Write
# your bet down, in MiB, before you go on.
# %% [markdown] lang="ja"
# # 1. ピークを予想する
#
# 小さな AlphaFold 2 のパラメーターは 22 万 6 千個、重みは 0.9 MiB です。32 残基のタンパク質 1 つで学習 1 ステップを行うと、メモリーはどれだけ
# 必要でしょうか。先に進む前に、予想を MiB で書き留めてください。
# %%
import lesson

import memfit

job = lesson.job(lesson.ALPHAFOLD)

# %% [markdown] lang="en"
# ## See the prediction
#
# Nothing is trained here: the step runs on tensors that have shapes and no data.
# %% [markdown] lang="ja"
# ## 予測を見る
#
# ここでは学習を行いません。形だけを持ち、中身のないテンソルでステップを動かします。
# %%
predicted = memfit.estimate(job)
print("predicted peak", lesson.mib(predicted.allocated_bytes.value))
print("it consists of", lesson.parts(predicted.estimate.at_peak_bytes))

# %% [markdown] lang="en"
# The weights are next to nothing. What fills the memory are *activations*, the intermediate results that backward needs. Now train two steps, in a
# process of its own, in which an allocator counts every tensor.
# %% [markdown] lang="ja"
# 重みはほとんど場所をとりません。メモリーを占めるのは*活性値*、つまり逆伝播で必要になる途中結果です。次に、別のプロセスで 2 ステップ
# 学習します。そのプロセスでは、すべてのテンソルをアロケーターが数えます。
# %%
measured = lesson.train(lesson.ALPHAFOLD)
print("measured peak", lesson.mib(measured.peak_bytes))
print(f"prediction is off by {measured.peak_bytes / predicted.allocated_bytes.value - 1:+.3%}")

# %% [markdown] lang="en"
# ## Run under a cap
#
# With a limit of two thirds of the peak, the same training must die.
# %% [markdown] lang="ja"
# ## 上限を設けて実行する
#
# ピークの 3 分の 2 を上限にすると、同じ学習は止まるはずです。
# %%
capped = lesson.train(lesson.ALPHAFOLD, memory_bytes=int(measured.peak_bytes * 2 / 3))
print(capped.outcome, "-", capped.reason)

# %% [markdown] lang="en"
# ## Question
#
# With two proteins in a batch instead of one, the peak becomes
#
# - a: almost the same, as the model stays as it is
# - b: about twice as large
# - c: about four times as large
#
# Decide, then run the last cell with your letter (as a script: `python lessons/01_bet_on_the_peak.py b`).
# %% [markdown] lang="ja"
# ## 問題
#
# バッチのタンパク質を 1 つから 2 つにすると、ピークはどうなるでしょうか。
#
# - a：モデルは同じなので、ほとんど変わらない
# - b：約 2 倍になる
# - c：約 4 倍になる
#
# 決めたら、最後のセルに文字を入れて実行してください（スクリプトでは `python lessons/01_bet_on_the_peak.py b`）。
# %%
import dataclasses

two = memfit.estimate(lesson.job(dataclasses.replace(lesson.ALPHAFOLD, batch=2)))
ratio = two.allocated_bytes.value / predicted.allocated_bytes.value
question = lesson.Question(
    truth="a" if ratio < 1.3 else "b" if ratio < 2.7 else "c",
    because=f"{lesson.mib(two.allocated_bytes.value)}, {ratio:.2f} x",
)
lesson.finish(question, lesson.answer())
