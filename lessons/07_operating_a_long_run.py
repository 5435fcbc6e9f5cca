# %% [markdown] lang="en"
# # 7. Operating a long run
#
# A training of days is interrupted: by the scheduler, by a card, by you. What matters is that it goes on as if nothing had happened. Here a run of ESM-2 is ended
# after three of six steps and resumed, and compared with one that was left alone.
# %% [markdown] lang="ja"
# # 7. 長い学習の運用
#
# 何日もかかる学習は、スケジューラーや GPU の都合、あるいは自分の判断で中断されます。大切なのは、何もなかったかのように続くことです。ここでは ESM-2 の学習を
# 6 ステップのうち 3 ステップで終えて再開し、中断しなかった学習と比べます。
# %%
import tempfile
from pathlib import Path

import lesson

folder = Path(tempfile.mkdtemp(prefix="lesson-"))
whole = lesson.train(lesson.ESM, steps=6)
first = lesson.train(lesson.ESM, steps=3, save=str(folder / "run"))
second = lesson.train(lesson.ESM, steps=6, save=str(folder / "run"), resume=str(folder / "run"))
print("undisturbed    ", whole.losses)
print("first half     ", first.losses)
print("resumed, second", second.losses[-3:])

# %% [markdown] lang="en"
# A checkpoint holds more than weights: the optimizer's state, the step, the order of the data, each rank's random state. It appears completely or not at all, and
# every file has a checksum. Look what is in it.
# %% [markdown] lang="ja"
# チェックポイントには、重みのほかに、オプティマイザーの状態、ステップ番号、データの順序、ランクごとの乱数の状態が入っています。書き終えたものだけが残り、各ファイルに
# チェックサムが付きます。中身を見てみましょう。
# %%
for file in sorted((folder / "run").rglob("*")):
    if file.is_file():
        print(f"{file.stat().st_size:>10,} B  {file.relative_to(folder)}")

# %% [markdown] lang="en"
# On a cluster, `memfit run --save run/ --save-every 500 --grace 25s` saves when the scheduler sends SIGTERM, and the same command with `--resume run/` goes on. Exit code 75
# means: saved, resume me.
#
# ## Question
#
# The optimizer's state (two moments of Adam for each parameter) is left out of a checkpoint to save space. What happens after the resume?
#
# - a: nothing, the moments are computed again from the weights
# - b: the loss goes on from where it was, but later steps differ from the undisturbed run
# - c: the training starts from the beginning
# %% [markdown] lang="ja"
# クラスターでは、`memfit run --save run/ --save-every 500 --grace 25s` とすると、スケジューラーが SIGTERM を送ったときに保存します。同じコマンドに `--resume run/` を付けると
# 続きから始まります。終了コード 75 は「保存済み。再開できる」という意味です。
#
# ## 問題
#
# 容量を節約するために、オプティマイザーの状態（パラメーターごとに Adam の二つのモーメント）をチェックポイントから省いたとします。再開後はどうなるでしょうか。
#
# - a：何も変わらない。モーメントは重みから計算し直される
# - b：損失は続きから始まるが、その後のステップは中断しなかった学習と異なる
# - c：学習が最初からになる
# %%
import torch


def losses(*, forget_at: int | None) -> list[float]:
    """Train the job for six steps in this process; forget the optimizer's state before a step."""
    job = lesson.job(lesson.ESM)
    torch.manual_seed(0)
    model = job.build_model()
    optimizer, series = torch.optim.Adam(model.parameters(), lr=1e-3), []
    for step in range(6):
        if step == forget_at:
            optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        loss = job.loss(model, job.make_batch(step, 0))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        series.append(loss.item())
    return series


kept, forgot = losses(forget_at=None), losses(forget_at=3)
is_same, goes_on = kept == forgot, kept[3] == forgot[3]
question = lesson.Question(
    truth="a" if is_same else "b" if goes_on else "c",
    because=f"step 4: {kept[3]:.6f} and {forgot[3]:.6f}; step 6: {kept[5]:.6f} and {forgot[5]:.6f}",
)
lesson.finish(question, lesson.answer())
