"""Joint allocation of experts and bits: damages measured on the weights and in llama.cpp, to choose by."""
