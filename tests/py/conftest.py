"""What all Python tests share."""

from hypothesis import settings

# Machines that run the tests differ in speed; pytest-timeout is what ends a test that hangs.
settings.register_profile("kvtier", deadline=None)
settings.load_profile("kvtier")
