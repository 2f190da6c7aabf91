"""Start explorer.py: python -m experiments.explorer"""

from experiments.explorer.explorer import main
from support.program import run_program

if __name__ == "__main__":
    run_program(main)
