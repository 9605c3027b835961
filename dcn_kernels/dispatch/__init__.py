"""What every call passes through: the row of an operator, the shapes, the arrays, the dispatcher."""
