"""What a reviewer sees: one parent run and a child run per step in MLflow, through a journal that survives it."""
