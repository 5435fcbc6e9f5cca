#!/bin/bash
# QLoRA with flags; the batch is a variable.
BATCH=4
CUDA_VISIBLE_DEVICES=0 llamafactory-cli train \
    --stage sft \
    --do_train \
    --model_name_or_path ../models/my-model \
    --dataset answers \
    --template default \
    --finetuning_type lora \
    --lora_target q_proj,v_proj \
    --lora_rank 64 \
    --quantization_bit 4 \
    --disable_gradient_checkpointing \
    --output_dir outputs \
    --per_device_train_batch_size $BATCH \
    --gradient_accumulation_steps 4 \
    --resume_lora_training True \
    --optim paged_adamw_8bit \
    --learning_rate 1e-5 \
    --fp16
