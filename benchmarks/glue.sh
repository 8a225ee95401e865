#!/usr/bin/env bash
# The runs behind the last table of docs/findings.md: one float fine-tuning a task, then three methods from that same
# float model.
#
#   benchmarks/glue.sh DATASET_DIR [SEED]
#
# DATASET_DIR holds <task>/{train,validation,test}.parquet. Works in ./glue_runs, on a GPU if there is one, where the
# three methods run side by side, and ends with benchmarks/results/*.json. TASKS="sst2 mrpc" says which tasks.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
data=$(cd "$1" && pwd)
seed=${2:-0}
python=${PYTHON:-python}
export HF_HUB_OFFLINE=1
mkdir -p glue_runs
cd glue_runs
# Results hold the command: relative names keep this machine's folders out of it.
ln -sfn "$data" glue
[ -d minilm ] || "$python" "$root/examples/demo/fetch_model.py" minilm

name=seed$seed
common="--dataset_dir glue --do_train --do_eval --per_device_train_batch_size 32 --warmup_steps 0.1 --bf16 --seed $seed"
# The tables are of training without a teacher, in random order, with the identity as straight-through estimator.
common="$common --train_sampling_strategy random"
if [ "$("$python" -c 'import torch; print(torch.cuda.is_available())')" = True ]; then
    name=${name}_cuda
else
    common="$common --use_cpu"
fi
for task in ${TASKS:-sst2 mrpc}; do
    if [ $task = sst2 ]; then
        float="--max_train_samples 12000 --max_seq_length 64 --num_train_epochs 3"
        binary="--max_train_samples 12000 --max_seq_length 64 --num_train_epochs 4 --learning_rate 2e-4"
    else
        float="--max_seq_length 128 --num_train_epochs 3"
        binary="--max_seq_length 128 --num_train_epochs 4 --learning_rate 1e-4"
    fi
    run="$python $root/examples/glue/run_glue.py --task_name $task $common"
    [ -f $task-float-$name/summary.json ] || $run --model_name_or_path minilm --method float $float \
        --learning_rate 5e-5 --save_strategy no --output_dir $task-float-$name
    cp $task-float-$name/summary.json "$root/benchmarks/results/glue_${task}_float_$name.json"
    running=
    for method in ste stompp stompp_ste; do
        case $method in *ste) surrogate=ste ;; *) surrogate=none ;; esac
        $run --model_name_or_path $task-float-$name --method $method --surrogate $surrogate --teacher none $binary \
            --weight_clip 3 --activation_clip 10 --eval_strategy epoch --save_strategy epoch --save_total_limit 1 \
            --load_best_model_at_end --metric_for_best_model accuracy --logging_steps 50 \
            --output_dir $task-$method-$name &
        running="$running $!"
        [[ $name = *cuda ]] || { wait $running; running=; }
    done
    for process in $running; do wait "$process"; done
    for method in ste stompp stompp_ste; do
        cp $task-$method-$name/summary.json "$root/benchmarks/results/glue_${task}_${method}_$name.json"
    done
done
"$python" "$root/benchmarks/glue_table.py"
