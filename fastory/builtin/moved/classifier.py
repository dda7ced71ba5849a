"""Now `python -m fastory.builtin.evaluation.classifier`."""

from fastory.builtin.evaluation.classifier import main

if __name__ == "__main__":
    main()
