"""What a plan says, in each of its languages: titles, the names of figures and the sentences of verdicts.

Formulas and sources stay in English, as those do who publish them.
"""

from __future__ import annotations

from typing import Any

from porcelet.errors import InputError

WORDS: dict[str, dict[str, Any]] = {
    "en": {
        "title": "Plan: {model} on {fleet}",
        "verdicts": "What follows",
        "question": "What was asked",
        "asked": {
            "model": "model", "weights": "weights", "fleet": "devices", "prompt": "prompt (tokens)",
            "answer": "answer (tokens)", "thinking": "tokens written for one shown", "hits": "found in the cache",
            "speed": "promised speed (tokens/s)", "first_token": "promised wait (s)", "turns": "questions an hour",
            "users": "people to be served", "busy_hours": "busy hours a day", "supply": "devices are",
            "electricity": "electricity ($/kWh)", "tariff": "compared with",
        },
        "ways": {"rented": "rented", "bought": "bought", "owned": "owned already"},
        "figure": "Figure", "value": "Value", "range": "Range", "how": "How, and from what",
        "sections": {
            "memory": "Memory of the fullest device", "speed": "Speed", "cost": "Cost", "training": "Training",
        },
        "rows": {
            "weights": "weights", "activations": "activations", "runtime": "runtime", "reserve": "reserve",
            "cache token": "cache of a token", "available": "memory", "cache tokens": "tokens of cache that fit",
            "written": "tokens written", "speed": "speed of an answer", "alone": "speed of a lone answer",
            "first_token": "wait for the first token", "computed": "prompts computed, if nothing else is",
            "prompt_share": "time that prompts take", "concurrency": "answers at once", "users": "people served",
            "hourly": "the fleet", "output_million": "a million tokens written",
            "input_million": "a million prompt tokens computed", "month": "a month", "busy": "use of the capacity",
            "kwh_million": "electricity of a million tokens", "api_month": "the same month through the API",
            "break_even": "use from which the fleet is cheaper",
            "device_hours": "device hours", "days": "days", "utilisation": "utilisation, with attention",
            "without_attention": "utilisation, products alone", "training_cost": "cost of the run",
        },
        "layouts": "Ways to lay it out",
        "layout": "Layout", "copies": "Copies", "at_once": "Answers at once", "written": "Tokens/s",
        "limit": "Bound by",
        "most": "At most", "limits": {
            "compute": "computing", "memory": "memory", "link": "links in a node", "network": "network",
        },
        "plots": {
            "curve": "Throughput against the speed of an answer", "cost": "Cost of a month against its use",
            "memory": "Memory of a device, in GB",
        },
        "across": {"curve": "tokens/s of one answer", "cost": "million tokens written a month"},
        "lines": {"written": "tokens/s in all", "own": "fleet", "api": "API"},
        "labels": {
            "measured": "measured", "published": "published", "derived": "derived", "assumed": "assumed",
        },
        "note": "Each figure has its formula, its range and the sources of what is in it. A label says how firm its "
        "weakest part is. Plans say what well-tuned engines reach, not what every engine does.",
        "said": {
            "fits": "{model} fits on {fleet}: {layout}, {copies} x.",
            "does_not_fit": "{model} does not fit on {fleet}: its weights take {weights:,.0f} GB as {format}, and "
            "there "
            "are {memory:,.0f} GB. These would fit:",
            "change_weights": "fewer bits: {setting}", "change_context": "shorter requests: {setting}",
            "change_devices": "more of the same: {setting}", "change_hardware": "other devices: {setting}",
            "change_model": "a smaller model: {setting}",
            "too_slow": "Too slow: even alone an answer comes at {speed:.1f} tokens/s after {wait:.1f} s; {wanted:g} "
            "after {patience:g} s were promised.",
            "serves": "It serves {users:,.0f} people online.",
            "enough": "It serves {users:,.0f} people online; {wanted:,.0f} were asked for.",
            "not_enough": "It serves {users:,.0f} people online of {wanted:,.0f}: take {needed}.",
            "never_enough": "It serves {users:,.0f} people online of {wanted:,.0f}, and no fleet of up to 2,048 "
            "{device} serves them all.",
            "buy_less": "Buy less: {needed} are enough, not {fleet}.",
            "stay_on_api": "Stay on an API if price is all that counts: {own:,.0f} $ a month against {api:,.0f} $ at "
            "{tariff}'s prices; the fleet is cheaper from {share:.0f} % of its capacity.",
            "never_cheaper": "Stay on an API if price is all that counts: {own:,.0f} $ a month against {api:,.0f} $ at "
            "{tariff}'s prices, and even fully used the fleet is dearer.",
            "own_is_cheaper": "The fleet is cheaper: {own:,.0f} $ a month against {api:,.0f} $ at {tariff}'s prices.",
            "about_even": "Price does not decide: {own:,.0f} $ a month against {api:,.0f} $ at {tariff}'s prices, "
            "which "
            "lies within what is uncertain.",
            "trains": "Training takes {days:,.1f} days; {layout} needs least memory, {memory:.0f} GB a device.",
            "cannot_train": "{model} cannot be trained on {fleet}: no layout fits into its memory.",
        },
    },
    "fr": {
        "title": "Plan : {model} sur {fleet}",
        "verdicts": "Ce qui en découle",
        "question": "La question",
        "asked": {
            "model": "modèle", "weights": "poids", "fleet": "appareils", "prompt": "invite (jetons)",
            "answer": "réponse (jetons)", "thinking": "jetons écrits pour un montré", "hits": "trouvés dans le cache",
            "speed": "débit promis (jetons/s)", "first_token": "attente promise (s)", "turns": "questions par heure",
            "users": "personnes à servir", "busy_hours": "heures d’activité par jour", "supply": "les appareils sont",
            "electricity": "électricité ($/kWh)", "tariff": "comparé à",
        },
        "ways": {"rented": "loués", "bought": "achetés", "owned": "déjà là"},
        "figure": "Grandeur", "value": "Valeur", "range": "Fourchette", "how": "Calcul et sources",
        "sections": {
            "memory": "Mémoire de l’appareil le plus chargé", "speed": "Vitesse", "cost": "Coût",
            "training": "Entraînement",
        },
        "rows": {
            "weights": "poids", "activations": "activations", "runtime": "environnement", "reserve": "réserve",
            "cache token": "cache d’un jeton", "available": "mémoire", "cache tokens": "jetons de cache possibles",
            "written": "jetons écrits", "speed": "débit d’une réponse", "alone": "débit d’une réponse seule",
            "first_token": "attente du premier jeton", "computed": "invites calculées, sans rien d’autre",
            "prompt_share": "temps pris par les invites", "concurrency": "réponses simultanées",
            "users": "personnes servies",
            "hourly": "le parc", "output_million": "un million de jetons écrits",
            "input_million": "un million de jetons d’invite calculés", "month": "un mois",
            "busy": "part de la capacité utilisée",
            "kwh_million": "électricité d’un million de jetons", "api_month": "le même mois par l’API",
            "break_even": "usage à partir duquel le parc est moins cher",
            "device_hours": "heures d’appareil", "days": "jours", "utilisation": "utilisation, avec attention",
            "without_attention": "utilisation, produits seuls", "training_cost": "coût de l’entraînement",
        },
        "layouts": "Répartitions possibles",
        "layout": "Répartition", "copies": "Copies", "at_once": "Réponses simultanées", "written": "Jetons/s",
        "limit": "Limité par", "most": "Au plus", "limits": {
            "compute": "calcul", "memory": "mémoire", "link": "liens d’un nœud", "network": "réseau",
        },
        "plots": {
            "curve": "Débit total selon le débit d’une réponse", "cost": "Coût d’un mois selon l’usage",
            "memory": "Mémoire d’un appareil, en Go",
        },
        "across": {"curve": "jetons/s d’une réponse", "cost": "millions de jetons écrits par mois"},
        "lines": {"written": "jetons/s en tout", "own": "parc", "api": "API"},
        "labels": {
            "measured": "mesuré", "published": "publié", "derived": "déduit", "assumed": "supposé",
        },
        "note": "Chaque grandeur a sa formule, sa fourchette et ses sources. L’étiquette dit combien la plus faible "
        "est "
        "sûre. Un plan dit ce qu’atteignent des moteurs bien réglés, pas ce que fait chacun.",
        "said": {
            "fits": "{model} tient sur {fleet} : {layout}, {copies} x.",
            "does_not_fit": "{model} ne tient pas sur {fleet} : ses poids prennent {weights:,.0f} Go en {format}, "
            "et il y "
            "a {memory:,.0f} Go. Ceci tiendrait :",
            "change_weights": "moins de bits : {setting}", "change_context": "des requêtes plus courtes : {setting}",
            "change_devices": "plus d’appareils : {setting}", "change_hardware": "d’autres appareils : {setting}",
            "change_model": "un modèle plus petit : {setting}",
            "too_slow": "Trop lent : même seule, une réponse vient à {speed:.1f} jetons/s après {wait:.1f} s ; "
            "promis : "
            "{wanted:g} après {patience:g} s.",
            "serves": "Cela sert {users:,.0f} personnes en ligne.",
            "enough": "Cela sert {users:,.0f} personnes en ligne ; {wanted:,.0f} étaient demandées.",
            "not_enough": "Cela sert {users:,.0f} personnes en ligne sur {wanted:,.0f} : prenez {needed}.",
            "never_enough": "Cela sert {users:,.0f} personnes en ligne sur {wanted:,.0f}, et aucun parc jusqu’à 2 048 "
            "{device} ne les sert toutes.",
            "buy_less": "Achetez moins : {needed} suffisent, au lieu de {fleet}.",
            "stay_on_api": "Restez sur une API si seul le prix compte : {own:,.0f} $ par mois contre {api:,.0f} $ "
            "aux prix "
            "de {tariff} ; le parc est moins cher à partir de {share:.0f} % de sa capacité.",
            "never_cheaper": "Restez sur une API si seul le prix compte : {own:,.0f} $ par mois contre {api:,.0f} $ "
            "aux "
            "prix de {tariff} ; même pleinement utilisé, le parc est plus cher.",
            "own_is_cheaper": "Le parc est moins cher : {own:,.0f} $ par mois contre {api:,.0f} $ aux prix de "
            "{tariff}.",
            "about_even": "Le prix ne tranche pas : {own:,.0f} $ par mois contre {api:,.0f} $ aux prix de {tariff}, "
            "dans "
            "la marge d’incertitude.",
            "trains": "L’entraînement prend {days:,.1f} jours ; {layout} demande le moins de mémoire, {memory:.0f} "
            "Go par "
            "appareil.",
            "cannot_train": "{model} ne peut pas être entraîné sur {fleet} : aucune répartition ne tient en mémoire.",
        },
    },
    "zh": {
        "title": "规划：{model}，{fleet}",
        "verdicts": "结论",
        "question": "所问",
        "asked": {
            "model": "模型", "weights": "权重", "fleet": "设备", "prompt": "提示（词元）",
            "answer": "回答（词元）", "thinking": "每个可见词元所写词元", "hits": "缓存命中",
            "speed": "承诺速度（词元/秒）", "first_token": "承诺等待（秒）", "turns": "每小时提问",
            "users": "要服务的人数", "busy_hours": "每日繁忙小时", "supply": "设备来源",
            "electricity": "电价（$/kWh）", "tariff": "对比的价格",
        },
        "ways": {"rented": "租用", "bought": "购买", "owned": "已有"},
        "figure": "项目", "value": "数值", "range": "范围", "how": "算法与来源",
        "sections": {"memory": "最满设备的内存", "speed": "速度", "cost": "成本", "training": "训练"},
        "rows": {
            "weights": "权重", "activations": "激活", "runtime": "运行环境", "reserve": "预留",
            "cache token": "每词元缓存", "available": "内存", "cache tokens": "可容纳的缓存词元",
            "written": "写出的词元", "speed": "单个回答的速度", "alone": "独占时的速度",
            "first_token": "首词元等待", "computed": "只算提示时的速度",
            "prompt_share": "提示所占时间", "concurrency": "同时回答数", "users": "可服务人数",
            "hourly": "全部设备", "output_million": "写出一百万词元",
            "input_million": "计算一百万提示词元", "month": "一个月", "busy": "容量利用率",
            "kwh_million": "一百万词元的用电", "api_month": "同样一个月走 API",
            "break_even": "利用率达到此值后自有更便宜",
            "device_hours": "设备小时", "days": "天数", "utilisation": "利用率（含注意力）",
            "without_attention": "利用率（仅矩阵乘）", "training_cost": "训练成本",
        },
        "layouts": "可行的布局",
        "layout": "布局", "copies": "份数", "at_once": "同时回答", "written": "词元/秒", "limit": "受限于",
        "most": "最多", "limits": {"compute": "计算", "memory": "内存", "link": "节点内互连", "network": "网络"},
        "plots": {
            "curve": "总吞吐与单个回答速度", "cost": "月成本与用量", "memory": "单个设备的内存（GB）",
        },
        "across": {"curve": "单个回答的词元/秒", "cost": "每月写出词元（百万）"},
        "lines": {"written": "总词元/秒", "own": "自有设备", "api": "API"},
        "labels": {"measured": "实测", "published": "已发表", "derived": "推算", "assumed": "假设"},
        "note": "每个数值都有算法、范围和来源。标签表示其中最弱一环的可靠程度。"
        "规划给出的是调优良好的引擎所能达到的水平，"
        "并非每个引擎都能做到。",
        "said": {
            "fits": "{model} 可放入 {fleet}：{layout}，{copies} x。",
            "does_not_fit": "{model} 放不进 {fleet}：以 {format} 存放的权重需 {weights:,.0f} GB，而内存共 "
            "{memory:,.0f} GB。以下做法可行：",
            "change_weights": "减少位数：{setting}", "change_context": "缩短请求：{setting}",
            "change_devices": "增加同类设备：{setting}", "change_hardware": "换用其他设备：{setting}",
            "change_model": "换用更小的模型：{setting}",
            "too_slow": "太慢：即使独占，回答也只有每秒 {speed:.1f} 个词元，首词元等待 {wait:.1f} 秒；"
            "承诺的是 {wanted:g} 和 {patience:g} 秒。",
            "serves": "可同时服务 {users:,.0f} 名在线用户。",
            "enough": "可服务 {users:,.0f} 名在线用户，所需为 {wanted:,.0f} 名。",
            "not_enough": "只能服务 {users:,.0f} 名在线用户，所需为 {wanted:,.0f} 名：请用 {needed}。",
            "never_enough": "只能服务 {users:,.0f} 名在线用户，所需为 {wanted:,.0f} 名；2,048 个以内的 {device} "
            "都不够。",
            "buy_less": "少买一些：{needed} 就够，不需要 {fleet}。",
            "stay_on_api": "若只看价格，请继续用 API：自有每月 {own:,.0f} $，按 {tariff} 的价格为 {api:,.0f} $；"
            "利用率达到 {share:.0f} % 后自有更便宜。",
            "never_cheaper": "若只看价格，请继续用 API：自有每月 {own:,.0f} $，按 {tariff} 的价格为 {api:,.0f} $；"
            "即使满负荷，自有也更贵。",
            "own_is_cheaper": "自有更便宜：每月 {own:,.0f} $，按 {tariff} 的价格为 {api:,.0f} $。",
            "about_even": "价格不起决定作用：每月 {own:,.0f} $，按 {tariff} 的价格为 {api:,.0f} $，差别在误差之内。",
            "trains": "训练需 {days:,.1f} 天；{layout} 占内存最少，每个设备 {memory:.0f} GB。",
            "cannot_train": "{model} 无法在 {fleet} 上训练：没有布局放得进内存。",
        },
    },
}  # fmt: skip


def words(language: str) -> dict[str, Any]:
    """Raises InputError for a language that there is none of."""
    if language not in WORDS:
        raise InputError(f"language is {language!r}; it must be one of {', '.join(WORDS)}")
    return WORDS[language]
