"""Now `python -m fastory.builtin.training`."""

from fastory.builtin.training.stages import main

if __name__ == "__main__":
    main()
