# Flags take precedence over the file that --config names.
torchrun --standalone --nproc_per_node=2 $(which mace_run_train) \
    --config=mace-config.yml --launcher=torchrun --batch_size=8 --clip_grad=None
