"""What a run will do and what it will take, from its recipe, its data and the base's config.json, before any weight is loaded.

``run.py`` says what it does, ``longest.py`` finds the microbatch that takes most, ``memory.py`` counts bytes on a device (``walk.py``
those of transformers' own blocks), ``cost.py`` time and disk, ``checks.py`` finds what cannot work, ``advice.py`` what to change, and
``outlook.py`` is all of it.
"""

from qlora_lightning.plan.outlook import memory_lines
from qlora_lightning.plan.run import plan_run, plan_table

__all__ = ["memory_lines", "plan_run", "plan_table"]
