"""`python -m fastory.builtin.training`. The processes of a stage find its functions in stages.py by their names."""

from fastory.builtin.training.stages import main

if __name__ == "__main__":
    main()
