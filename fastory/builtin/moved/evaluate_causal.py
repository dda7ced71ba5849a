"""Now `python -m fastory.builtin.evaluation.causal`."""

from fastory.builtin.evaluation.causal import main

if __name__ == "__main__":
    main()
