# %% [markdown] lang="en"
# # 6. Money, and reading a report
#
# ESM-2 with 650 million parameters is to be fine-tuned for 20,000 steps. A card with a low price an hour, or one with a high price that is faster? Nobody needs
# to rent either to know roughly.
# %% [markdown] lang="ja"
# # 6. 費用とレポートの読み方
#
# 6 億 5 千万パラメーターの ESM-2 を 20,000 ステップ微調整します。時間単価の低い GPU と、単価は高いが速い GPU のどちらがよいでしょうか。おおよその答えは、
# 借りなくても分かります。
# %%
import lesson

import memfit
from memfit.types.job import JobRef

STEPS = 20_000
job = lesson.job(JobRef(spec="protein-lm", size="650M", batch=16, length=512))
recomputing = {"activation-checkpointing": {}, "bf16-autocast": {}}
offers = {
    "RTX-4090, recomputing": ("RTX-4090", recomputing),
    "A100-80GB-SXM, bf16": ("A100-80GB-SXM", "bf16-autocast"),
    "H100-SXM, bf16": ("H100-SXM", "bf16-autocast"),
}
costs, fitting = {}, {}
for name, (machine, plan) in offers.items():
    result = memfit.estimate(job, plan=plan, machine=machine)
    step, price = result.estimate.step_s, result.estimate.usd
    costs[name] = price * STEPS
    if result.fits:
        fitting[name] = costs[name]
    print(
        f"{name:23} fits {result.fits!s:5} needs {result.needed_bytes / 2**30:5.1f} GiB  "
        f"step {step.value:.2f} s ({step.low:.2f} to {step.high:.2f})  {STEPS:,} steps: ${costs[name]:,.2f}"
    )

# %% [markdown] lang="en"
# Read these lines as you would read the report. *Needs* is predicted, and the upper end of its range decides whether it fits. *Step* is predicted from published
# figures, and its range is wide. The price is *assumed*: a catalog price with a date, which your own offer replaces. Nothing here is measured. So the right
# sentence is not "the RTX-4090 costs that much", but "it should cost about that; we rent it for a day and see".
#
# The report of a proof of concept (`memfit report`) has the same three marks on every number, and the money page adds what these lines leave out: hours of
# set-up, electricity, purchase, and how the answer changes if a figure is wrong.
#
# ## Question
#
# The RTX-4090 has the lowest price an hour of the three. By these predictions, is its training also the cheapest of those that fit?
#
# - a: yes
# - b: no, a more expensive card is cheaper in the end
# - c: it does not fit at all
# %% [markdown] lang="ja"
# レポートを読むつもりで、上の行を読んでください。*needs*（必要量）は予測で、幅の上端によって収まるかどうかを判定します。*step*（ステップ時間）は公表値から
# 導いた予測で、幅は広くなります。価格は*仮定*、つまり日付のあるカタログの値で、自社の見積もりに置き換えるものです。実測値は一つもありません。したがって
# 「RTX-4090 ならこの費用で済む」ではなく、「この程度になる見込みなので、1 日借りて確かめる」と言うのが正確です。
#
# PoC のレポート（`memfit report --lang ja`）でも、すべての数値にこの三つの印が付いています。費用のページには、ここで省いた準備の時間、電気代、購入と、値が
# 外れたときに答えがどう変わるかも加わります。
#
# ## 問題
#
# 三つのうち、時間単価が最も低いのは RTX-4090 です。この予測によれば、収まるものの中で学習の総額も最も安いでしょうか。
#
# - a：はい
# - b：いいえ。単価の高い GPU のほうが、総額では安い
# - c：そもそも収まらない
# %%
cheapest = min(fitting, key=fitting.__getitem__)
card = "RTX-4090, recomputing"
question = lesson.Question(
    truth="c" if card not in fitting else "a" if cheapest == card else "b",
    because=f"cheapest of those that fit: {cheapest}, ${fitting[cheapest]:,.2f}",
)
lesson.finish(question, lesson.answer())
