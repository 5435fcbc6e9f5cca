python3 train_openfold.py mmcifs alignments templates out 2021-10-10 --config_preset finetuning --seed 4 --gpus 8
