#!/bin/bash
#SBATCH --gres=gpu:1
# One device, with an average of the weights.
srun python ~/mace/mace/cli/run_train.py \
    --name="water" \
    --train_file="train.xyz" \
    --valid_fraction=0.05 \
    --E0s='{1:-13.66, 8:-2042.03}' \
    --model="MACE" \
    --hidden_irreps='128x0e + 128x1o' \
    --r_max=5.0 \
    --batch_size=32 \
    --valid_batch_size=16 \
    --max_num_epochs=500 \
    --swa \
    --start_swa=400 \
    --ema \
    --ema_decay=0.995 \
    --amsgrad \
    --clip_grad=5 \
    --default_dtype="float32" \
    --enable_cueq=True \
    --device=cuda
