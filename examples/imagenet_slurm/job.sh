#!/bin/bash
# ImageNet-1k from tar shards on SLURM: a TokenFormer ViT-B/16 that grows twice. One command starts and resumes.
#   sbatch --export=ALL,DATA=/data/imagenet-shards examples/imagenet_slurm/job.sh
#SBATCH --job-name=grow-vit
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=SIGUSR1@120
set -euo pipefail
: "${DATA:?folder with imagenet-train-*.tar and imagenet-validation-*.tar}"
export OMP_NUM_THREADS=1 TORCH_NCCL_ASYNC_ERROR_HANDLING=1

# 16 processes of 256 images: the batch of 4,096 of the published recipe
arguments=(
    fit --config tokenformer_vit_base_imagenet_grown
    --data.dataset wds/imagenet --data.root "$DATA" --data.loader.batch_size 256 --data.loader.num_workers 10
    --trainer.num_nodes "${SLURM_NNODES:-1}" --trainer.devices "${SLURM_NTASKS_PER_NODE:-1}" --trainer.strategy ddp
    --trainer.default_root_dir "${OUTPUT:-runs/imagenet}" --run_name "${NAME:-grow-vit}" --ckpt_path last
)
${LAUNCH-srun} python -m lit_tokenformer "${arguments[@]}" "$@"
