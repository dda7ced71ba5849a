"""Now `python -m fastory.builtin.training.drawn_stories`."""

from fastory.builtin.training.drawn_stories import main

if __name__ == "__main__":
    main()
