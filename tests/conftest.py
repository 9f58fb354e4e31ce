"""Set before torch is imported: threads that wait sleep, else a busy machine makes the tests several times slower."""
import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
