"""What a report says, in each of its languages. Metrics are named here too: plots hold numbers and stages' names."""

from __future__ import annotations

from typing import Any

WORDS: dict[str, dict[str, Any]] = {
    "en": {
        "title": "Training report: {name}",
        "facts": "The run",
        "recipe": "recipe", "minutes_of_steps": "minutes of steps", "seed": "seed", "sessions": "sessions",
        "begun": "begun", "device": "device", "threads": "threads", "rate": "matrix rate (GFLOP/s)",
        "stages": "Stage by stage",
        "stage": "Stage", "method": "Method", "steps": "Steps", "minutes": "Minutes", "tokens": "Tokens",
        "kept": "Answers kept", "answer_length": "Answer (tokens)",
        "shares": "Problems solved, in %", "lengths": "Length of an answer, in tokens",
        "note": "Shares are over held-out problems, in %: pass@k says how many are solved by k answers. Below "
        "them, and as bars, 95 % intervals from resampling the problems.",
        "plotted": "Thin: each step; bold: the mean of the last {window} steps. Best and last are those of the mean.",
        "step": "step",
        "of": "{name}: {first} at first, {last} at last", "best": ", best {value} ({place})", "at_step": "step {step}",
        "samples": "The same problems after each stage",
        "samples_note": "Held-out problems. What the model thinks is grey, what it answers is bold.",
        "right": "right", "wrong": "wrong", "silent": "no answer", "thinking": "reasoning",
        "plots": {
            "loss": "Loss", "cross_entropy": "Cross-entropy, in nats a token",
            "reward": "Reward", "length": "Length of an answer, in tokens",
            "waste": "Lost work, as shares", "clip": "Tokens whose ratio was clipped, as a share",
            "distance": "Distance to the teacher, in nats a token", "kept": "Answers kept in a step",
            "balance": "Balance of the experts (MaxVio; 0 is even)", "rate": "Learning rate",
        },
        "metrics": {
            "loss": "loss", "cross_entropy": "cross-entropy", "reward": "mean reward",
            "completions/mean_length": "mean length", "no_signal": "groups without a signal",
            "completions/clipped_ratio": "answers cut off", "clip_ratio/region_mean": "clipped",
            "distance": "distance", "kept": "kept", "max_violation": "MaxVio", "learning_rate": "rate",
        },
    },
    "fr": {
        "title": "Rapport d’entraînement : {name}",
        "facts": "L’exécution",
        "recipe": "recette", "minutes_of_steps": "minutes de pas", "seed": "graine", "sessions": "sessions",
        "begun": "début", "device": "appareil", "threads": "fils", "rate": "débit matriciel (GFLOP/s)",
        "stages": "Étape par étape",
        "stage": "Étape", "method": "Méthode", "steps": "Pas", "minutes": "Minutes", "tokens": "Jetons",
        "kept": "Réponses gardées", "answer_length": "Réponse (jetons)",
        "shares": "Problèmes résolus, en %", "lengths": "Longueur d’une réponse, en jetons",
        "note": "Parts mesurées sur des problèmes jamais vus, en % : pass@k dit combien sont résolus par k réponses. "
        "En dessous, et en barres, intervalles à 95 % par rééchantillonnage des problèmes.",
        "plotted": "Trait fin : chaque pas ; trait gras : moyenne des {window} derniers pas. Le meilleur et le dernier "
        "sont ceux de la moyenne.",
        "step": "pas",
        "of": "{name} : {first} au début, {last} à la fin", "best": ", meilleur {value} ({place})",
        "at_step": "pas {step}",
        "samples": "Les mêmes problèmes après chaque étape",
        "samples_note": "Problèmes jamais vus. La réflexion du modèle est en gris, sa réponse en gras.",
        "right": "juste", "wrong": "faux", "silent": "pas de réponse", "thinking": "réflexion",
        "plots": {
            "loss": "Perte", "cross_entropy": "Entropie croisée, en nats par jeton",
            "reward": "Récompense", "length": "Longueur d’une réponse, en jetons",
            "waste": "Travail perdu, en parts", "clip": "Part des jetons au rapport écrêté",
            "distance": "Distance au professeur, en nats par jeton", "kept": "Réponses gardées par pas",
            "balance": "Équilibre des experts (MaxVio ; 0 : parfait)", "rate": "Taux d’apprentissage",
        },
        "metrics": {
            "loss": "perte", "cross_entropy": "entropie croisée", "reward": "récompense moyenne",
            "completions/mean_length": "longueur moyenne", "no_signal": "groupes sans signal",
            "completions/clipped_ratio": "réponses coupées", "clip_ratio/region_mean": "écrêtés",
            "distance": "distance", "kept": "gardées", "max_violation": "MaxVio", "learning_rate": "taux",
        },
    },
    "zh": {
        "title": "训练报告：{name}",
        "facts": "本次运行",
        "recipe": "配方", "minutes_of_steps": "训练步用时（分钟）", "seed": "随机种子", "sessions": "会话数",
        "begun": "开始", "device": "设备", "threads": "线程", "rate": "矩阵速率（GFLOP/s）",
        "stages": "各阶段",
        "stage": "阶段", "method": "方法", "steps": "步数", "minutes": "分钟", "tokens": "词元",
        "kept": "保留的回答", "answer_length": "回答（词元）",
        "shares": "解出的题目（%）", "lengths": "回答长度（词元）",
        "note": "比例（%）在未参与训练的题目上测得：pass@k 指 k 个回答能解出的题目所占比例。"
        "其下数字与误差线为对题目重采样得到的 95 % 区间。",
        "plotted": "细线：每一步；粗线：最近 {window} 步的均值。最佳值与末值取自均值。",
        "step": "步",
        "of": "{name}：开始 {first}，结束 {last}", "best": "，最佳 {value}（{place}）", "at_step": "第 {step} 步",
        "samples": "各阶段之后的同一批题目",
        "samples_note": "未参与训练的题目。模型的思考为灰色，回答为粗体。",
        "right": "正确", "wrong": "错误", "silent": "没有回答", "thinking": "思考",
        "plots": {
            "loss": "损失", "cross_entropy": "交叉熵（奈特每词元）",
            "reward": "奖励", "length": "回答长度（词元）",
            "waste": "无效工作（比例）", "clip": "比率被裁剪的词元（比例）",
            "distance": "与教师的距离（奈特每词元）", "kept": "每步保留的回答",
            "balance": "专家均衡（MaxVio；0 为完全均衡）", "rate": "学习率",
        },
        "metrics": {
            "loss": "损失", "cross_entropy": "交叉熵", "reward": "平均奖励",
            "completions/mean_length": "平均长度", "no_signal": "无信号的组",
            "completions/clipped_ratio": "被截断的回答", "clip_ratio/region_mean": "被裁剪",
            "distance": "距离", "kept": "保留", "max_violation": "MaxVio", "learning_rate": "学习率",
        },
    },
}  # fmt: skip
