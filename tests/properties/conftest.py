"""How many examples the property tests try: the same few every time, or with PROPERTIES=large many more."""

import os

from hypothesis import HealthCheck, settings

slow_is_fine = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("few", max_examples=20, derandomize=True, database=None, **slow_is_fine)
settings.register_profile("large", max_examples=1000, database=None, **slow_is_fine)
settings.load_profile(os.environ.get("PROPERTIES", "few"))
