"""The settings that nobody gives: by recipe, by base, by reward and by method. r2d3.resolve fills them in."""

from __future__ import annotations

# What a recipe sets: how the reward gradient is estimated, and how the residual is matched (r2d3.py, sections 8 and 9).
RECIPES = {
    "paper": {"estimator": "step", "matching": "score", "branch": "guided", "time_weight": "squared",
              "last_step": "always", "skip_below": 0.0},
    "fast": {"estimator": "sample", "matching": "eps", "branch": "conditional", "time_weight": "squared",
             "last_step": "always", "skip_below": 0.25, "reg_weight": 1.0},
}

# A scorer has its reward's settings.
SAME = {"laion": "aesthetic", "hps-v2.1": "hpsv2", "hps-v2.0": "hpsv2", "marigold": "normal"}
PAPER_REG_WEIGHT = {"aesthetic": 3e3, "hpsv2": 5e3}             # lambda of the recipe "paper"; geometry rewards: 1e4

# The paper's settings for its bases. Its text gives two values of beta for the aesthetic reward (2e6 in an ablation and in
# the released code, 1e7 in one sentence); 2e6 is taken.
PAPER = {
    "": {"recipe": "paper", "sampler": "dpm", "steps": 20, "lora_rank": 8, "epochs": 100, "batch_size": 16,
         "updates_per_epoch": 4, "micro_batch": 2, "lr": 1e-4, "beta": 1e6, "views": 4, "view_size": 512},
    "aesthetic": {"beta": 2e6}, "hpsv2": {"beta": 1e7}, "normal": {"min_quantile": 0.2}, "dnc": {"min_quantile": 0.2},
}
# By base. Later ones win: what stands under "", the first reward named (a sum takes its beta), the recipe, the
# recipe's own by reward ("" where it has none of its own), the method, and last what the user gives.
PRESETS = {
    "shapes": {     # its beta is about 15 standard deviations of the aesthetic reward within a prompt (15sd measures 288)
        "": {"recipe": "fast", "sampler": "dpm", "steps": 30, "lora_rank": 8, "epochs": 6, "batch_size": 16,
             "updates_per_epoch": 16, "micro_batch": 16, "lr": 1e-3, "beta": 285.0, "views": 2,
             "view_size": 48},
        # A match of scores is dominated by the last step, where k is about 1000, so its beta is larger by as much.
        "paper": {
            "": {"beta": 1e5},
            "aesthetic": {"beta": 3e4},
            "hpsv2": {"beta": 1e6, "epochs": 12},
            "normal": {"beta": 1e6, "epochs": 12},
            "dnc": {"beta": 3e5, "epochs": 12},
        },
        "refl": {"epochs": 64, "batch_size": 1, "updates_per_epoch": 1, "lr": 2e-4},
        "draft": {"epochs": 32, "batch_size": 2, "updates_per_epoch": 1, "lr": 2e-4},
        "ddpo": {"epochs": 40, "batch_size": 16, "updates_per_epoch": 4, "lr": 1e-3, "last_step": "never"},
    },
    "diffsplat-pixart": PAPER | {"": PAPER[""] | {"lora_rank": 16}},
    "diffsplat-sd15": PAPER | {"": PAPER[""] | {"sampler": "ddim"}},
    "gaussiancube": PAPER | {"": PAPER[""] | {"steps": 50}},
    # The paper trains no rectified flow. A match in v, the network's own output, needs a lambda like that of
    # "fast": the paper's belongs to a match of scores, which weighs noise levels by k squared.
    "diffsplat-sd35": PAPER | {"": PAPER[""] | {"steps": 28, "lora_rank": 16},
                               "nabla": {"matching": "v", "reg_weight": 1.0, "last_step": "never"},
                               "ddpo": {"last_step": "never"}},
}


def defaults(base: str, recipe: str | None, rewards: list[str], method: str) -> dict:
    """Settings by name, for what is not given. A base that is not known (one of the caller's own) has those of `shapes`."""
    presets = PRESETS.get(base, PRESETS["shapes"])
    rewards = [SAME.get(reward, reward) for reward in rewards]
    found = presets[""] | presets.get(rewards[0], {})
    found["recipe"] = recipe or found["recipe"]
    found |= {"reg_weight": PAPER_REG_WEIGHT.get(rewards[0], 1e4)} | RECIPES[found["recipe"]]
    by_reward = presets.get(found["recipe"], {})
    found |= by_reward.get(rewards[0], by_reward.get("", {})) | presets.get(method, {})
    return found | {"min_quantile": max(presets.get(reward, {}).get("min_quantile", 0.0) for reward in rewards)}
