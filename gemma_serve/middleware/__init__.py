"""Pure ASGI middleware, one class a file; `app.py` has the one list that orders them."""
