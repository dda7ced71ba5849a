"""Now `python -m fastory.builtin.evaluation.iterative`."""

from fastory.builtin.evaluation.iterative import main

if __name__ == "__main__":
    main()
