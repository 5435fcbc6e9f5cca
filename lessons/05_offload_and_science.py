# %% [markdown] lang="en"
# # 5. Offload, and what science may lose
#
# Two ways to train AlphaFold 2 in less memory. One moves activations to disk and reads them back. The other takes a simpler optimizer, which keeps half as
# much state. Both fit. Are both still your experiment?
# %% [markdown] lang="ja"
# # 5. オフロードと、科学として失ってよいもの
#
# AlphaFold 2 を少ないメモリーで学習する方法を二つ比べます。一つは活性値をディスクに移して読み戻す方法、もう一つは状態が半分で済む単純なオプティマイザーを
# 使う方法です。どちらも収まります。では、どちらも同じ実験と言えるでしょうか。
# %%
import lesson

import memfit
from memfit.techniques.registry import effect_of

job = lesson.job(lesson.ALPHAFOLD)
for plan in (None, "activation-offload", "sgd"):
    result = memfit.estimate(job, plan=plan)
    peak = lesson.mib(result.allocated_bytes.value)
    print(f"{result.plan.label:45} {peak:>9}  effect {effect_of(result.plan).label}")

# %% [markdown] lang="en"
# The effect class tells before any run what may change: E0 nothing, E1 the order of sums, E2 the precision, E3 the algorithm. Train all three.
# %% [markdown] lang="ja"
# 影響の区分を見れば、実行する前に何が変わりうるかが分かります。E0 は何も変わらず、E1 は加算の順序、E2 は精度、E3 はアルゴリズムが変わります。三つとも
# 学習します。
# %%
plans = {"plain": None, "offload": "activation-offload", "sgd": "sgd"}
runs = {name: lesson.train(lesson.ALPHAFOLD, plan, steps=3) for name, plan in plans.items()}
for name, run in runs.items():
    print(f"{name:8} {lesson.mib(run.peak_bytes):>9}  losses {[round(loss, 6) for loss in run.losses]}")

# %% [markdown] lang="en"
# For E0, equality is checked and there is nothing to discuss. For E2 and E3 somebody must decide: which metric, which margin, how many seeds, and *before*
# the run. `memfit poc` does that, with a training made worse on purpose as a control: a test that would not notice half the training proves nothing.
#
# ## Question
#
# Which of the two plans may you use without a test on your metric?
#
# - a: offload
# - b: the simpler optimizer
# - c: both
# %% [markdown] lang="ja"
# E0 なら、一致を確かめるだけで議論の余地はありません。E2 と E3 では、どの指標で、どの許容範囲で、いくつのシードで比べるかを、実行の*前*に誰かが決める
# 必要があります。`memfit poc` は、意図的に劣化させた学習を対照として、この検定を行います。学習を半分に減らしても気づかない検定では、何も示せない
# からです。
#
# ## 問題
#
# 評価指標による検定なしで使ってよいのは、どちらのプランでしょうか。
#
# - a：オフロード
# - b：単純なオプティマイザー
# - c：両方
# %%
same = [runs[name].weights_digest == runs["plain"].weights_digest for name in ("offload", "sgd")]
question = lesson.Question(
    truth={(True, False): "a", (False, True): "b", (True, True): "c"}[tuple(same)],
    because=f"trained weights equal to plain training's: offload {same[0]}, SGD {same[1]}",
)
lesson.finish(question, lesson.answer())
