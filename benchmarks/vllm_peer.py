"""vLLM as a peer of benchmarks.serve, run by the Python of an environment that has it (docs/development.md).

Started with a checkpoint and a dtype; answers each JSON line {"prompts", "max_tokens"} with {"first_s", "whole_s"}:
the seconds for one token of every prompt, and for all of them.
"""

import json
import os
import sys
import time

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "-".join(map(str, (0, len(os.sched_getaffinity(0)) - 1))))
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ["HF_HUB_OFFLINE"] = "1"


def main() -> None:
    answers, sys.stdout = sys.stdout, sys.stderr  # the library prints
    import vllm

    folder = sys.argv[1]
    dtype = sys.argv[2]
    context = int(sys.argv[3])
    engine = vllm.LLM(
        folder, dtype=dtype, max_model_len=context, max_num_seqs=16, enforce_eager=True, disable_log_stats=True
    )
    print(json.dumps({"version": vllm.__version__}), file=answers, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        prompts = [{"prompt_token_ids": ids} for ids in asked["prompts"]]

        def seconds(num_tokens: int, prompts: list[dict[str, list[int]]] = prompts) -> float:
            sampling = vllm.SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
            began = time.monotonic()
            engine.generate(prompts, sampling, use_tqdm=False)
            engine.reset_prefix_cache()
            return time.monotonic() - began

        spent = {"first_s": seconds(1), "whole_s": seconds(asked["max_tokens"])}
        print(json.dumps(spent), file=answers, flush=True)


if __name__ == "__main__":
    main()
