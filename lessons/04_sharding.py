# %% [markdown] lang="en"
# # 4. Sharding
#
# Two devices can share a model in two ways. With DDP, each holds all of it and half of the batch. With FSDP2, each also holds only half of the parameters,
# the gradients and the optimizer's state, and borrows the rest for the moment of use. Two processes on this machine stand for two devices.
# %% [markdown] lang="ja"
# # 4. 分割
#
# 2 台のデバイスでモデルを分担する方法は二つあります。DDP では、それぞれがモデル全体とバッチの半分を持ちます。FSDP2 ではさらに、パラメーター、勾配、
# オプティマイザーの状態も半分ずつ持ち、残りは使う瞬間だけ借ります。ここでは、このマシンの 2 つのプロセスを 2 台のデバイスに見立てます。
# %%
import lesson

import memfit

FSDP2 = {"ranks": 2, "techniques": {"fsdp2": {}}}
job = lesson.job(lesson.ESM)
one = memfit.estimate(job)
ddp = memfit.estimate(job, plan={"ranks": 2, "techniques": {"ddp": {}}})
fsdp = memfit.estimate(job, plan=FSDP2)
for name, result in {"one device": one, "DDP, each of two": ddp, "FSDP2, each of two": fsdp}.items():
    print(
        f"{name:19} {lesson.mib(result.allocated_bytes.value):>9}:",
        lesson.parts(result.estimate.at_peak_bytes),
    )

# %% [markdown] lang="en"
# Now train under FSDP2, two processes that talk over gloo. memfit checks in the first step that parameters are really sharded.
# %% [markdown] lang="ja"
# 次に、gloo で通信する 2 つのプロセスで、FSDP2 により学習します。memfit は最初のステップで、パラメーターが実際に分割されていることを確かめます。
# %%
sharded = lesson.train(lesson.ESM, FSDP2)
print(sharded.outcome, "peak of the fuller rank", lesson.mib(sharded.peak_bytes))

# %% [markdown] lang="en"
# ## Question
#
# Of DDP's memory on each of the two devices, which part does FSDP2 halve?
#
# - a: the activations
# - b: the optimizer's state
# - c: both
# %% [markdown] lang="ja"
# ## 問題
#
# 2 台それぞれの DDP のメモリーのうち、FSDP2 で半分になるのはどれでしょうか。
#
# - a：活性値
# - b：オプティマイザーの状態
# - c：両方
# %%


def share(category: str) -> float:
    """Return FSDP2's bytes of a category at the peak, by DDP's."""
    of_ddp, of_fsdp = (result.estimate.at_peak_bytes for result in (ddp, fsdp))
    return of_fsdp.get(category, 0) / of_ddp[category]


activation, state = share("activation"), share("optimizer_state")
halved = (activation < 0.7, state < 0.7)
question = lesson.Question(
    truth={(True, False): "a", (False, True): "b", (True, True): "c"}[halved],
    because=f"FSDP2 by DDP: activations {activation:.2f} x, optimizer state {state:.2f} x",
)
lesson.finish(question, lesson.answer())
