"""How a logical tensor becomes stored bytes."""
