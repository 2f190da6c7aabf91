"""Start compare.py: python -m experiments.compare"""

from experiments.compare.compare import main
from support.program import run_program

if __name__ == "__main__":
    run_program(main)
