"""Published results of training, repeated small: whether what holds for billions of parameters shows at a million.

    python -m benchmarks.shapes NAME [--seeds 3] [--quick] [--append]

    balance   the sign rule against an auxiliary loss and nothing       Loss-Free Balancing, arXiv 2408.15664
    experts   dense, GShard's experts, DeepSeekMoE's                    DeepSeekMoE, arXiv 2401.06066
    muon      Muon's steps to AdamW's loss                              Moonlight, arXiv 2502.16982
    mtp       what MTP guesses, and what it costs the main model        DeepSeek-V3 report, arXiv 2412.19437
    traces    countdown learnt from searches or from solutions alone    Stream of Search, arXiv 2404.03683
    grpo      reinforcement behind supervised training                  DeepSeekMath, arXiv 2402.03300; CS224R

Each trains a few models of 0.5 to 1.1 M parameters on one thread and holds a claim against its published direction: it
"holds" in every seed, in the mean alone, or it does not hold, and that is said. The sizes of effects are not expected
to be the published ones. Variants and seeds take turns. Text is the standard library of the running Python, which every
machine has; its hash is in the result, as another version gives other numbers.
"""
