#include "src/export/fuse/ahead.h"

#include <pthread.h>

#include <algorithm>

namespace spillway {

std::byte* ReadAhead::Slots::take() {
  std::lock_guard lock(mutex);
  if (free.empty()) return nullptr;
  std::byte* p = free.back();
  free.pop_back();
  return p;
}

void ReadAhead::Slots::give(std::byte* p) {
  std::lock_guard lock(mutex);
  free.push_back(p);
}

struct ReadAhead::Piece {
  Piece(Slots& s, std::byte* b, std::shared_ptr<PmemFile> f, uint64_t at, uint64_t n)
      : slots(s), bytes(b), file(std::move(f)), offset(at), length(n) {}
  ~Piece() { slots.give(bytes); }
  uint64_t end() const { return offset + length; }

  Slots& slots;
  std::byte* const bytes;
  const std::shared_ptr<PmemFile> file;
  const uint64_t offset, length;
  AsyncEvent done;
  // Under ReadAhead::mutex_:
  uint64_t answered = 0;
  bool stale = false, ready = false;
};

Status ReadAhead::start() {
  SPILLWAY_TRY(reactor_, UringReactor::create(64));
  slots_.memory = AlignedBuffer(kPieces * kPiece);
  if (!slots_.memory) return fail(ErrorKind::kNoMemory, "pmem read-ahead");
  for (size_t i = kPieces; i-- > 0;) slots_.free.push_back(slots_.memory.data() + i * kPiece);
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
  std::byte* bytes = slots_.take();
  if (bytes == nullptr) {
    auto old = std::find_if(pieces_.begin(), pieces_.end(), [](auto& p) { return p->ready && p.use_count() == 1; });
    if (old == pieces_.end()) return;
    pieces_.erase(old);
    bytes = slots_.take();
    if (bytes == nullptr) return;
  }
  auto piece = std::make_shared<Piece>(slots_, bytes, file, offset, std::min(kPiece, file->size() - offset));
  pieces_.push_back(piece);
  in_flight_.push_back(piece);
  there_.store(pieces_.size(), std::memory_order_relaxed);
  reactor_->post([this, piece = std::move(piece)]() mutable { reactor_->spawn(read(std::move(piece))); });
}

Task<void> ReadAhead::read(std::shared_ptr<Piece> piece) {
  const Status s = co_await piece->file->read_ahead(piece->offset, {piece->bytes, piece->length});
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
    found.iov[found.count] = {p->bytes + (from - p->offset), static_cast<size_t>(to - from)};
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
