# %% [markdown] lang="en"
# # 2. Precision
#
# "bf16 halves the memory" is said often and is seldom true. A small ESM-2 shows what each of two ways halves, and what it leaves.
# %% [markdown] lang="ja"
# # 2. 精度
#
# 「bf16 にすればメモリーが半分になる」とよく言われますが、そのとおりになることはまれです。小さな ESM-2 で、二つの方法がそれぞれ何を半分にし、
# 何をそのまま残すかを調べます。
# %%
import lesson

import memfit

job = lesson.job(lesson.ESM)
plain = memfit.estimate(job)
autocast = memfit.estimate(job, plan="bf16-autocast")
stored = memfit.estimate(job, plan="bf16-parameters")
for name, result in {"fp32": plain, "bf16 by autocast": autocast, "bf16 parameters": stored}.items():
    print(
        f"{name:17} {lesson.mib(result.allocated_bytes.value):>9}:",
        lesson.parts(result.estimate.at_peak_bytes),
    )

# %% [markdown] lang="en"
# Autocast multiplies in bf16, and activations that come out of these products are half as large. Parameters and the optimizer's state stay in
# float32, and values that softmax and norms need stay, too. Storing the parameters in bf16 makes nearly all activations short; in return it keeps
# float32 copies of the weights ("master"), so that small updates are not rounded away.
#
# Is the loss the same? Train two steps each way.
# %% [markdown] lang="ja"
# autocast では乗算を bf16 で行い、その結果の活性値が半分になります。パラメーターとオプティマイザーの状態は float32 のままで、softmax や正規化に必要な
# 値も残ります。パラメーターを bf16 で保存すると、活性値のほとんどが短くなりますが、小さな更新が丸めで消えないように、float32 の重みのコピー
# （マスター重み）も持ちます。
#
# 損失は同じでしょうか。それぞれ 2 ステップ学習します。
# %%
exact = lesson.train(lesson.ESM)
half = lesson.train(lesson.ESM, "bf16-autocast")
print("losses fp32", exact.losses, "bf16", half.losses)

# %% [markdown] lang="en"
# ## Question
#
# A model's memory is mostly the optimizer's state (many parameters, short samples). What does bf16 autocast do to its peak?
#
# - a: it halves it
# - b: next to nothing
# - c: it doubles it
# %% [markdown] lang="ja"
# ## 問題
#
# メモリーの大部分がオプティマイザーの状態であるモデル（パラメーターが多く、サンプルが短い）があります。bf16 autocast でピークはどうなるでしょうか。
#
# - a：半分になる
# - b：ほとんど変わらない
# - c：2 倍になる
# %%
import dataclasses

wide = lesson.job(dataclasses.replace(lesson.ESM, batch=1, length=16))
before, after = (memfit.estimate(wide, plan=plan).allocated_bytes.value for plan in (None, "bf16-autocast"))
ratio = after / before
question = lesson.Question(
    truth="a" if ratio < 0.6 else "b" if ratio < 1.4 else "c",
    because=f"{lesson.mib(before)} -> {lesson.mib(after)}, {ratio:.2f} x",
)
lesson.finish(question, lesson.answer())
