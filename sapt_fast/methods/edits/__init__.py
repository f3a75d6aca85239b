"""What methods of model editing have in common."""
