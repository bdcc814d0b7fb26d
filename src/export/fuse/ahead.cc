#include "src/export/fuse/ahead.h"

#include <pthread.h>

#include <algorithm>

namespace spillway {

struct ReadAhead::Piece {
  Piece(std::atomic<size_t>& count, std::shared_ptr<PmemFile> f, uint64_t at, uint64_t n)
      : alive(count), file(std::move(f)), offset(at), length(n), buffer(kPiece) {
    alive.fetch_add(1, std::memory_order_relaxed);
  }
  ~Piece() { alive.fetch_sub(1, std::memory_order_relaxed); }
  uint64_t end() const { return offset + length; }

  std::atomic<size_t>& alive;
  const std::shared_ptr<PmemFile> file;
  const uint64_t offset, length;
  const AlignedBuffer buffer;
  AsyncEvent done;
  // Under ReadAhead::mutex_:
  uint64_t answered = 0;
  bool stale = false, ready = false;
};

Status ReadAhead::start() {
  SPILLWAY_TRY(reactor_, UringReactor::create(64));
  running_ = true;
  thread_ = std::thread([this] { reactor_->run(); });
  pthread_setname_np(thread_.native_handle(), "fuse-ahead");
  return {};
}

void ReadAhead::stop() {
  {
    std::unique_lock lock(mutex_);
    running_ = false;
    ended_.wait(lock, [this] { return in_flight_.empty(); });
    erase_pieces([](const Piece&) { return true; });
    streams_ = {};
  }
  if (!thread_.joinable()) return;
  reactor_->stop();
  thread_.join();
}

// Under mutex_, as the next two.
template <class Goes>
void ReadAhead::erase_pieces(Goes goes) {
  std::erase_if(pieces_, [&](const auto& p) { return goes(*p); });
  there_.store(pieces_.size(), std::memory_order_relaxed);
}

std::shared_ptr<ReadAhead::Piece> ReadAhead::piece_at(const PmemFile& file, uint64_t offset) const {
  for (auto& p : pieces_)
    if (p->file.get() == &file && p->offset <= offset && offset < p->end()) return p;
  return nullptr;
}

// Does nothing when all memory is in use: the kernel's request will read for itself.
void ReadAhead::begin_piece(const std::shared_ptr<PmemFile>& file, uint64_t offset) {
  if (alive_.load(std::memory_order_relaxed) >= kPieces) {
    auto old = std::find_if(pieces_.begin(), pieces_.end(), [](auto& p) { return p->ready && p.use_count() == 1; });
    if (old == pieces_.end()) return;
    pieces_.erase(old);
  }
  auto piece = std::make_shared<Piece>(alive_, file, offset, std::min(kPiece, file->size() - offset));
  if (!piece->buffer) return;
  pieces_.push_back(piece);
  in_flight_.push_back(piece);
  there_.store(pieces_.size(), std::memory_order_relaxed);
  reactor_->post([this, piece = std::move(piece)]() mutable { reactor_->spawn(read(std::move(piece))); });
}

Task<void> ReadAhead::read(std::shared_ptr<Piece> piece) {
  const Status s = co_await piece->file->read_ahead(piece->offset, {piece->buffer.data(), piece->length});
  {
    std::lock_guard lock(mutex_);
    piece->ready = s && !piece->stale;
    if (!piece->ready) erase_pieces([&](const Piece& p) { return &p == piece.get(); });
  }
  piece->done.set();
  std::lock_guard lock(mutex_);
  std::erase(in_flight_, piece);
  piece.reset();  // so that the file is not held here when forget() returns
  ended_.notify_all();
}

void ReadAhead::note(const std::shared_ptr<PmemFile>& file, uint64_t offset, uint64_t length) {
  if (length < kStreamMin) return;
  const uint64_t end = offset + length;
  std::lock_guard lock(mutex_);
  if (!running_ || file->given_up()) return;  // given up before forget(): nothing begins after it
  // Near is good enough: several workers note the parts of one window of the kernel in any order.
  auto near = [&](const Stream& s) { return s.file == file && offset <= s.next + kMiB && end + kMiB >= s.next; };
  auto s = std::find_if(streams_.begin(), streams_.end(), near);
  if (s == streams_.end()) {
    s = std::min_element(streams_.begin(), streams_.end(), [](auto& a, auto& b) { return a.used < b.used; });
    *s = {};
    s->file = file;
  }
  s->used = ++clock_;
  s->next = std::max(s->next, end);
  s->run += length;
  s->ahead = std::max(s->ahead, align_down(s->next, kPageSize));
  const uint64_t until = std::min(s->next + std::min(s->run / 4, kAheadMax), file->size());
  for (; s->ahead < until && (s->ahead + kPiece <= until || until == file->size()); s->ahead += kPiece)
    begin_piece(file, s->ahead);
}

Task<ReadAhead::Found> ReadAhead::find(const PmemFile& file, uint64_t offset, uint64_t length) {
  Found found;
  if (empty() || length == 0) co_return found;
  const uint64_t end = offset + length;
  std::array<std::shared_ptr<Piece>, 2> pieces;
  {
    std::lock_guard lock(mutex_);
    pieces[0] = piece_at(file, offset);
    if (pieces[0] && pieces[0]->end() < end) pieces[1] = piece_at(file, pieces[0]->end());
    const Piece* last = pieces[1] ? pieces[1].get() : pieces[0].get();
    if (last == nullptr || last->end() < end) co_return found;
  }
  for (auto& p : pieces)
    if (p) co_await p->done.wait();
  std::lock_guard lock(mutex_);
  for (auto& p : pieces)
    if (p && (!p->ready || p->stale)) co_return found;
  for (auto& p : pieces) {
    if (!p) continue;
    const uint64_t from = std::max(offset, p->offset), to = std::min(end, p->end());
    found.iov[found.count] = {p->buffer.data() + (from - p->offset), static_cast<size_t>(to - from)};
    found.pieces[found.count++] = p;
    p->answered += to - from;
  }
  erase_pieces([](const Piece& p) { return p.ready && p.answered >= p.length; });
  co_return found;
}

void ReadAhead::changed(const PmemFile& file, uint64_t offset, uint64_t length) {
  // Always by the lock: the order of this and of begin_piece() says whether a piece may have read the old bytes.
  std::lock_guard lock(mutex_);
  for (auto& p : pieces_)
    if (p->file.get() == &file && p->offset < offset + length && offset < p->end()) p->stale = true;
  erase_pieces([](const Piece& p) { return p.stale; });
}

void ReadAhead::forget(const PmemFile& file) {
  std::unique_lock lock(mutex_);
  for (auto& s : streams_)
    if (s.file.get() == &file) s = {};
  for (auto& p : in_flight_) p->stale |= p->file.get() == &file;
  erase_pieces([&](const Piece& p) { return p.file.get() == &file; });
  ended_.wait(lock, [&] {
    return std::none_of(in_flight_.begin(), in_flight_.end(), [&](auto& p) { return p->file.get() == &file; });
  });
}

}  // namespace spillway
