"""How the weights of ``vit_t`` that the package ships came to be."""
