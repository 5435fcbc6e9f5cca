# %% [markdown] lang="en"
# # 8. When it dies
#
# First let ESM-2 die: a limit of half of what it needs. memfit says in which phase and step, and a run under a limit is an outcome, not an accident.
# %% [markdown] lang="ja"
# # 8. 止まったとき
#
# まず ESM-2 をわざと止めます。上限を必要量の半分にします。memfit は、どの段階のどのステップで止まったかを示します。上限を設けた実行でメモリー不足になるのは、事故では
# なく、結果の一つです。
# %%
import lesson

import memfit

needed = memfit.estimate(lesson.job(lesson.ESM)).allocated_bytes.value
dead = lesson.train(lesson.ESM, memory_bytes=int(needed / 2))
print(dead.outcome, "-", dead.reason)

# %% [markdown] lang="en"
# Most deaths happen elsewhere, and all that is left is a log. Three of them; `memfit autopsy` reads each.
# %% [markdown] lang="ja"
# たいていの学習は別の場所で止まり、残るのはログだけです。三つの例を `memfit autopsy` と同じ機能で読んでみましょう。
# %%
from memfit.monitoring.autopsy import diagnose_log

GROWING = """\
epoch 1 it    0 loss 2.400 | allocated 3.21 GiB reserved 3.90 GiB
epoch 1 it  200 loss 2.350 | allocated 6.65 GiB reserved 7.34 GiB
epoch 1 it  400 loss 2.300 | allocated 10.09 GiB reserved 10.78 GiB
epoch 1 it  600 loss 2.250 | allocated 13.53 GiB reserved 14.22 GiB
epoch 1 it  800 loss 2.200 | allocated 16.97 GiB reserved 17.66 GiB
epoch 1 it 1000 loss 2.150 | allocated 20.41 GiB reserved 21.10 GiB
torch.cuda.OutOfMemoryError: CUDA out of memory. Tried to allocate 288.00 MiB (GPU 0; 23.70 GiB total capacity; \
22.31 GiB already allocated; 139.81 MiB free; 22.94 GiB reserved in total by PyTorch)
"""
KILLED = """\
2026-05-17 17:41:02 epoch 4 iter 1100/1487 loss 1.82
slurmstepd-gpu20-15: error: Detected 1 oom-kill event(s) in StepId=9411285.0. Some of your processes may have been \
killed by the cgroup out-of-memory handler.
srun: error: gpu20-15: task 0: Out Of Memory
"""
VALIDATING = """\
Train epoch 1: 100%|##########| 1210/1210 [08:21<00:00,  2.41it/s, loss=0.554]
Valid epoch 1:   9%|9         | 1/11 [00:01<00:13,  1.33s/it]
Traceback (most recent call last):
  File "train.py", line 200, in main
    eval_loss = evaluate(model, criterion, epoch)
  File "train.py", line 157, in evaluate
    output, attention = model(text, speaker)
torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 190.00 MiB. GPU 0 has a total capacity of 7.92 GiB of \
which 102.25 MiB is free. Of the allocated memory 7.22 GiB is allocated by PyTorch, and 180.40 MiB is reserved by \
PyTorch but unallocated.
"""
for log in (GROWING, KILLED, VALIDATING):
    diagnosis = diagnose_log(log)
    print(f"{diagnosis.cause} ({diagnosis.certainty})", *diagnosis.evidence, sep="\n    ")

# %% [markdown] lang="en"
# ## Question
#
# The first training gets a card with twice the memory. What will happen?
#
# - a: it runs to its end
# - b: it dies at once
# - c: it dies later
# %% [markdown] lang="ja"
# ## 問題
#
# 一つ目の学習を、メモリーが 2 倍の GPU で実行したとします。どうなるでしょうか。
#
# - a：最後まで学習できる
# - b：すぐに止まる
# - c：後になって止まる
# %%
import re

seen = [(int(step), float(size)) for step, size in re.findall(r"it +(\d+) .* allocated ([\d.]+)", GROWING)]
per_step = (seen[-1][1] - seen[0][1]) / (seen[-1][0] - seen[0][0])
last_step = (2 * 23.70 - seen[0][1]) / per_step
is_leak = str(diagnose_log(GROWING).cause) == "leak"
question = lesson.Question(
    truth="b" if seen[0][1] > 2 * 23.70 else "c" if is_leak else "a",
    because=f"{per_step * 1024:.0f} MiB are kept in each step: the larger card is full after about {last_step:,.0f} steps",
)
lesson.finish(question, lesson.answer())
